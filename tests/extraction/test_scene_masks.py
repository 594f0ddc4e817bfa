"""``--mask`` of ``extract`` and ``batch``."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import rasterio
from batch_helpers import at, messages, noise, write
from helpers import write_geotiff
from rasterio.transform import Affine
from scipy.ndimage import distance_transform_edt
from site_helpers import PATCH, SIZE, TRANSFORM, refusal, run, scene

from common.patches import PatchPair, list_pairs, read_patch


@pytest.fixture
def coarse(site):
    """A mask of 40 m pixels over the scene of 10 m: clouds (9) in a block, its edge beyond."""
    side = SIZE // 4
    values = np.full((1, side, side), 4, np.uint8)
    values[0, 1:3, 2:5] = 9
    values[0, 6, 6] = 3
    path = site.folder / "clouds.tif"
    return write_geotiff(path, values, transform=TRANSFORM * Affine.scale(4))


def clouds() -> np.ndarray:
    """Where the values 9 of ``coarse`` lie in the scene."""
    found = np.zeros((SIZE, SIZE), bool)
    found[4:12, 8:20] = True
    return found


def check(site, cloudy: np.ndarray, **more) -> None:
    """Patches are invalid where it is cloudy, and nowhere else."""
    patches = site.patches()
    assert len(patches) == 9
    for patch in patches.values():
        valid = read_patch(PatchPair(patch.image_path, patch.label_path))[1]
        assert np.array_equal(valid, ~cloudy[patch.place()])
        assert np.array_equal(patch.labelled, ~cloudy[patch.place()])


@pytest.mark.parametrize("nodata", [0, None])
def test_what_the_mask_says_is_invalid_in_the_patches(site, coarse, capsys, nodata):
    site.draw_image(scene(), nodata=nodata)
    site.extract("--mask", coarse, "--mask_values", "9")
    check(site, clouds())
    line = f"about 4.2 % masked, 0.0 % beyond its edge (valid) by {coarse}"
    assert line in capsys.readouterr().err


def test_clouds_of_the_mask_grow_by_metres(site, coarse):
    site.extract("--mask", coarse, "--mask_values", "9", "--mask_buffer", "20")
    check(site, distance_transform_edt(~clouds()) <= 2)


def test_values_that_are_kept_and_bits(site, coarse):
    cloudy = clouds()
    cloudy[24:28, 24:28] = True
    site.extract("--mask", coarse, "--keep_values", "4")
    check(site, cloudy)
    shutil.rmtree(site.out)
    site.extract("--mask", coarse, "--mask_bits", "0")  # of 3 and 9
    check(site, cloudy)


def test_beyond_the_edge_of_the_mask_is_valid(site, capsys):
    path = site.folder / "clouds.tif"
    write_geotiff(path, np.ones((1, PATCH, SIZE), np.uint8), transform=TRANSFORM)
    site.extract("--mask", path, "--mask_values", "1", "--min_valid", "0")
    assert len(site.patches()) == 6
    assert "66.7 % beyond its edge (valid)" in capsys.readouterr().err


def test_resized_patches_leave_out_clouds(site, coarse):
    for patch in site.extract("--mask", coarse, "--mask_values", "9", size=8).values():
        rows, columns = (slice(s.start // 2, s.start // 2 + 8) for s in patch.place())
        assert np.array_equal(patch.labelled, ~clouds()[::2, ::2][rows, columns])


def test_a_mask_that_cannot_be_used_is_an_error(site, coarse, capsys):
    other = refusal(
        capsys, site, "--mask", site.folder / "none.tif", "--mask_values", "9"
    )
    assert "none.tif" in other
    assert run(*site.words("--mask", coarse)) == 2
    assert "one of --mask_values, --keep_values" in capsys.readouterr().err


def test_scenes_of_a_folder_have_a_mask_each_or_one(batch, capsys):
    for number, name in enumerate("ab"):
        place = at(16 * number, 0)
        image, label = noise(16)
        write(batch.data / f"Image_{name}.tif", image, place)
        write(batch.data / f"Label_{name}.tif", label, place)
        values = np.zeros((1, 16, 16), np.uint8)
        values[0, 8 * number : 8 * number + 4, :6] = 1
        write(batch.data / f"Clouds_{name}.tif", values, place)
    pattern = batch.data / "clouds_<id>.tif"
    batch.cut("--mask", pattern, "--mask_values", "1")

    def invalid() -> dict[str, int]:
        found = {}
        for split in ("train", "validation", "test"):
            for pair in list_pairs(batch.out, split, required=False):
                found[pair.name] = int((~read_patch(pair)[1]).sum())
        return {name: count for name, count in found.items() if count}

    assert invalid() == {"a_r000_c000": 24, "b_r001_c000": 24}
    shutil.rmtree(batch.out)
    batch.cut("--mask", batch.data / "Clouds_b.tif", "--mask_values", "1")
    assert invalid() == {"b_r001_c000": 24}
    shutil.rmtree(batch.out)
    (batch.data / "Clouds_b.tif").unlink()
    assert run(*batch.words("--mask", pattern, "--mask_values", "1")) == 1
    assert "Files without a partner" in capsys.readouterr().err
    batch.cut("--mask", pattern, "--mask_values", "1", "--skip_unmatched")
    assert invalid() == {"a_r000_c000": 24}


def test_a_mask_that_changed_since_refuses_the_resume(site, coarse, monkeypatch):
    from test_extraction_fixed import stop_after

    given = ("--mask", str(coarse), "--mask_values", "9")
    stop_after(monkeypatch, site, 4, *given)
    with rasterio.open(coarse, "r+") as file:
        file.write(np.zeros((SIZE // 4, SIZE // 4), np.uint8), 1)
    assert run(*site.words("--resume", *given)) == 1


def draw_row(batch, count: int) -> None:
    """Scenes a, b, c... of 16 x 16 pixels, one below the other."""
    for number, name in enumerate("abcdefg"[:count]):
        batch.draw(name, 16, seed=number, transform=at(0, 16 * number))


def clear_mask(folder, rows: int, place, **more):
    """A mask without a cloud."""
    return write(folder / "clear.tif", np.zeros((1, rows, 16), np.uint8), place, **more)


def test_scenes_that_one_mask_misses_or_covers_in_part_are_named(batch, capsys):
    draw_row(batch, 7)
    mask = clear_mask(batch.folder, 24, at(0, 0))
    lines = messages(capsys, *batch.words("--mask", mask, "--mask_values", "1"))
    missed, partly, shares = (line for line in lines if str(mask) in line)
    assert "no ground in common with 5 of 7 scenes, which it leaves valid: " in missed
    assert missed.endswith("Image_e.tif and 2 more") and "Image_c.tif" in missed
    assert "ends within 1 of 7 scenes" in partly and partly.endswith("Image_b.tif")
    wanted = "7 scenes: about 0.0 % masked, 78.6 % beyond its edge (valid)"
    assert shares.startswith(wanted)


def test_a_mask_that_covers_all_scenes_says_its_shares_once(batch, capsys):
    draw_row(batch, 3)
    mask = clear_mask(batch.folder, 48, at(0, 0))
    lines = messages(capsys, *batch.words("--mask", mask, "--mask_values", "1"))
    (shares,) = (line for line in lines if str(mask) in line)
    assert "3 scenes: about 0.0 % masked, 0.0 % beyond" in shares


@pytest.mark.parametrize(
    "more", [{"transform": at(0, 900)}, {"crs": "EPSG:4326"}, {"crs": "EPSG:32633"}]
)
def test_a_mask_of_another_place_is_refused(site, batch, capsys, more):
    path = site.folder / "other.tif"
    mask = write_geotiff(path, np.zeros((1, SIZE, SIZE), np.uint8),
                         **{"transform": TRANSFORM} | more)  # fmt: skip
    line = refusal(capsys, site, "--mask", mask, "--mask_values", "1")
    assert f"{mask} has no ground in common with {site.image}; give" in line
    draw_row(batch, 4)
    line = batch.refusal(capsys, "--mask", mask, "--mask_values", "1")
    assert str(mask) in line and "Image_c.tif and 1 more" in line


def test_a_mask_of_its_own_that_misses_its_scene_is_refused(batch, capsys):
    draw_row(batch, 2)
    for name in "ab":  # both are of the place of a
        write(batch.data / f"Clouds_{name}.tif", np.zeros((1, 16, 16), np.uint8))
    pattern = batch.data / "Clouds_<id>.tif"
    line = batch.refusal(capsys, "--mask", pattern, "--mask_values", "1")
    assert "Clouds_b.tif has no ground in common with" in line and "Image_b.tif" in line
    lines = messages(
        capsys,
        *batch.words("--mask", pattern, "--mask_values", "1", "--skip_errors"),
        status=1,
    )
    assert any("Clouds_b.tif has no ground" in line for line in lines)


def test_an_extraction_without_a_patch_says_what_its_mask_made_invalid(site, capsys):
    path = site.folder / "clouds.tif"
    values = np.zeros((1, SIZE, SIZE), np.uint8)
    mask = write_geotiff(path, values, transform=TRANSFORM, nodata=0)
    lines = messages(capsys, *site.words("--mask", mask, "--mask_values", 1), status=1)
    wanted = (
        f"about 100.0 % masked, 0.0 % beyond its edge (valid) by {mask}, which declares 0 as "
        "nodata (--keep_values keeps it)"
    )
    assert lines[-1].startswith("error: None of the") and wanted in lines[-1]
    lines = messages(capsys, *site.words("--mask", mask, "--mask_values", 0), status=1)
    wanted = f"by {mask}; its nodata value 0 is named, so it counts as the option says"
    assert lines[-1].startswith("error: None of the") and wanted in lines[-1]
    site.extract("--mask", mask, "--keep_values", 0)
    check(site, np.zeros((SIZE, SIZE), bool))

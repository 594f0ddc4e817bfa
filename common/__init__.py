"""What all packages share: errors, options, files, rasters, labels, patches, pictures, the machine."""

VERSION = "2.0.0.dev0"
UNLABELLED = 255  # the default --ignore_index, and what extraction writes
MISSING = -(2**31)  # a label pixel without a class, before classes are numbered
SPLITS = ("train", "validation", "test")

"""What scores, intervals, areas and confidence mean: training and prediction report with it."""

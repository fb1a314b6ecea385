"""What pretrained weights are for: segmentation from few labels, its evaluation, and its use."""

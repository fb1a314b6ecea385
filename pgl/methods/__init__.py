"""The methods of pretraining: PGL, and the baselines BYOL and Models Genesis."""

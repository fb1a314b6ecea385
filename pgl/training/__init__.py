"""The parts of a pretraining run: samples, steps, measurements, checkpoints; its loop is `pgl.pretrain`."""

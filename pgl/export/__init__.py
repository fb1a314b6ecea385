"""``pgl export``: pretrained weights as files for other programs, one module a format."""

from pgl.export.encoder import export_encoder, load_encoder, read_export, unet_weights

__all__ = ["export_encoder", "load_encoder", "read_export", "unet_weights"]

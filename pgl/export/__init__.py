"""``pgl export``: pretrained weights as files for other programs, one module a format."""

from pgl.export.encoder import check_networks, export_encoder, load_encoder, read_export

__all__ = ["check_networks", "export_encoder", "load_encoder", "read_export"]

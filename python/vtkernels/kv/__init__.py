"""The low-bit cache: what a page holds (:class:`KVFormat`) and which channels a mix keeps at two bits."""

from vtkernels.kv.format import PAGE_TOKENS, KVFormat, channel_order, kv_bytes_per_token

__all__ = ["PAGE_TOKENS", "KVFormat", "channel_order", "kv_bytes_per_token"]

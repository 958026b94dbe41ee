from tests.reference.kv import kv_unpack

__all__ = ["kv_unpack"]

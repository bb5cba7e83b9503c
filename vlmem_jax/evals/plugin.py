"""What lmms-eval finds of us, by the entry point in setup.py."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("vlmem", chat_class_path="vlmem_jax.evals.lmms.LmmsModel")

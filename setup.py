"""Package metadata; tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nemo_kto" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None, "nemo_kto/__init__.py has no __version__"

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
MLFLOW = ["mlflow-skinny>=3"]
TEST = [
    "compressed-tensors>=0.15",
    "hypothesis>=6.100",
    *MLFLOW,
    "peft>=0.17",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "scikit-learn>=1.4",
]

setup(
    name="nemo-kto",
    version=VERSION.group(1),
    description="KTO (Kahneman-Tversky Optimization) of language models on Megatron-Core, from binary feedback",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["nemo_kto", "nemo_kto.*"]), "nemo_kto.conf", "nemo_kto.docs"],
    package_dir={"nemo_kto.conf": "conf", "nemo_kto.docs": "docs"},
    # the page is what `nemo-kto config` reads
    package_data={
        "nemo_kto": ["py.typed"],
        "nemo_kto.conf": ["*.yaml", "recipe/*.yaml"],
        "nemo_kto.docs": ["configuration.md"],
    },
    install_requires=[
        "bitsandbytes>=0.46",
        "datasets>=3.0",
        "einops",  # imported by nemo_toolkit, which does not declare it
        "huggingface-hub>=1.0,<3",
        "hydra-core>=1.3.2,<1.4",
        "jinja2>=3.1",
        "lightning>=2.4,<2.6",
        "loky>=3.4",
        "matplotlib>=3.8",
        "megatron-core>=0.16.1,<0.20",
        "nemo_toolkit[common-only,core]>=3.0.0,<4",
        "numpy>=1.26",
        "omegaconf>=2.3,<2.4",
        "pillow>=10",
        "pyarrow>=15",
        "xxhash>=3.0",
        "psutil",  # Megatron-Core's checkpoint writer waits for ever without it
        "rich>=13",
        "safetensors>=0.5",
        "shtab>=1.7",
        "tensorboard>=2.15",
        "torch>=2.6,<3",
        "torchmetrics>=1.4",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require={
        "docs": DOCS,
        "mlflow": MLFLOW,
        "submitit": ["hydra-submitit-launcher>=1.2"],
        "test": TEST,
        "dev": [*TEST, *DOCS, "mypy>=1.15", "ruff>=0.12"],
    },
    entry_points={"console_scripts": ["nemo-kto = nemo_kto.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

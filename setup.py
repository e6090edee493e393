"""What pip needs to know about pkvpn; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read the literal without importing the package, whose dependencies may not be there yet."""
    text = (HERE / "pkvpn" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('pkvpn/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="pkvpn",
    version=version(),
    description="A SoftEther-compatible VPN server whose process tree heals itself",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: No Input/Output (Daemon)",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Security",
        "Topic :: System :: Networking",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["pkvpn", "pkvpn.*"]),
    package_data={"pkvpn": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=[
        "multiprocess>=0.70.16",
        "setproctitle>=1.3.3",
        "psutil>=5.9.5",
        "colorlog>=6.8",
        # encrypt_into and decrypt_into of the AEADs, which the record layer is built on.
        "cryptography>=47",
    ],
    extras_require={
        "dev": [
            "coverage>=7.10",  # the first with patch = subprocess, _exit
            "hypothesis>=6.100",
            "matplotlib>=3.8",  # the plots of benchmarks/
            "mypy>=1.15",
            "packaging>=24",  # the audit of dependencies
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["vpnserver = pkvpn.__main__:main"]},
)

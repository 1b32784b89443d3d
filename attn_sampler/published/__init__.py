"""Trained masked language models that packages on the Python index carry, and problems for them.

    attn-sampler models                    what is known, its licence and source, and what is here
    attn-sampler models --fetch rxnmapper  brings one into the cache folder

Nothing of them is part of this package: a wheel is downloaded by pip, refused unless its SHA-256 is the one
written down here, and read without running any of its code: weights are unpickled as weights only and saved
as safetensors, tables are read as literals. From then on no network is needed. ``load`` gives a folder that
``transformers`` opens; ``reactions`` and ``antibodies`` make problems whose answers can be checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from attn_sampler import documents

from . import convert

__all__ = ["MODELS", "PUBLISHED", "FetchError", "Published", "cache_folder", "fetch", "folder", "is_here"]


class FetchError(Exception):
    """Something published cannot be had, or is not what it should be; the message says why in one line."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Something that a wheel carries.

    Attributes
    ----------
    package, version, sha256
        The wheel on the index: what ``pip download`` is asked for, and the hash of the file.
    licence, source
        Whose terms they are, and where the work comes from.
    what
        In a few words.
    parts
        A function of ``convert`` for each name that may be loaded; it writes a folder from the wheel.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    licence: str
    source: str
    what: str
    parts: dict[str, Callable[[zipfile.ZipFile, Path], None]]


PUBLISHED: tuple[Published, ...] = (
    Published(
        "rxnmapper",
        "0.4.3",
        "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
        3,
        "MIT",
        "https://github.com/rxn4chemistry/rxnmapper (Schwaller et al., Science Advances 7, 2021)",
        "chemical reactions as SMILES: ALBERT, 12 layers, 8 heads, 0.8 M parameters",
        {"rxnmapper": convert.rxnmapper},
    ),
    Published(
        "sapiens",
        "1.0.5",
        "af1a8d445e9d7ab9f5f04512cf325acdfd9dd0930eb957b63ec234df1f141a8b",
        7,
        "MIT",
        "https://github.com/Merck/Sapiens (Prihoda et al., mAbs 14, 2022)",
        "human antibodies, heavy and light chains: two RoBERTas, 4 layers, 8 heads, 0.6 M parameters",
        {"sapiens-heavy": convert.sapiens_heavy, "sapiens-light": convert.sapiens_light},
    ),
    Published(
        "rxnfp",
        "0.1.0",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        75,
        "MIT",
        "https://github.com/rxn4chemistry/rxnfp (Schwaller et al., Nature Machine Intelligence 3, 2021)",
        "chemical reactions as SMILES: BERT, 12 layers, 4 heads, 6.7 M parameters",
        {"rxnfp": convert.rxnfp},
    ),
    Published(
        "abnumber",
        "0.4.4",
        "eed2c47e24fb5c77d7f80e77241a344372d1030c8ae9dfdb393f72b880ea84f3",
        1,
        "MIT",
        "https://github.com/prihoda/abnumber (germline genes of IMGT)",
        "no model: human germline genes of antibodies, aligned, for problems",
        {"germlines": convert.germlines},
    ),
)

#: The names of the models among them.
MODELS = tuple(part for published in PUBLISHED for part in published.parts if part != "germlines")
_SOURCE = "SOURCE.json"


def cache_folder() -> Path:
    """Where what was fetched is kept: ``attn_sampler`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_sampler"


def find(name: str) -> Published:
    """What carries the part ``name``.

    Raises
    ------
    ValueError
        Nothing does.
    """
    for published in PUBLISHED:
        if name in published.parts:
            return published
    names = ", ".join(part for published in PUBLISHED for part in published.parts)
    raise ValueError(f"published: expected one of {names}, got {name!r}")


def is_here(name: str, cache: Path | None = None) -> bool:
    """Whether ``folder`` needs no network."""
    return (_folder(name, cache) / _SOURCE).is_file()


def folder(name: str, cache: Path | None = None) -> Path:
    """The folder of a part, fetched first where it is not here; what lies there is checked.

    Raises
    ------
    ValueError
        ``name`` is none.
    FetchError
        It cannot be fetched, or its files were changed since.
    """
    published, path = find(name), _folder(name, cache)
    if not is_here(name, cache):
        fetch(published, cache=cache)
    try:
        written = documents.parse_json(documents.read_text(path / _SOURCE))["files"]
    except (KeyError, TypeError, ValueError):
        written = {_SOURCE: None}
    for file, digest in written.items():
        if not (path / file).is_file() or _sha256(path / file) != digest:
            raise FetchError(f"{path / file}: was changed since it was fetched; remove {path}")
    return path


def fetch(published: Published, *, archive: Path | None = None, cache: Path | None = None) -> list[Path]:
    """Bring a wheel's parts into the cache folder, each whole or not at all.

    Parameters
    ----------
    published
        One of ``PUBLISHED``.
    archive
        The wheel, where it is on this machine already. Default: ``pip download`` brings it.
    cache
        Default: ``cache_folder()``.

    Returns
    -------
    list of Path
        A folder for each part.

    Raises
    ------
    FetchError
        There is no such wheel to be had, it is not the one that is known, or it cannot be converted here.
    """
    convert.check_requirements(published.parts)
    with tempfile.TemporaryDirectory(prefix="attn_sampler-") as scratch:
        wheel = _download(published, Path(scratch)) if archive is None else archive
        try:
            digest = _sha256(wheel)
        except OSError as error:
            raise FetchError(f"{wheel}: {error.strerror}") from None
        if digest != published.sha256:
            raise FetchError(
                f"{wheel.name}: refused: its SHA-256 is {digest}, that of {published.package} "
                f"{published.version} is {published.sha256}"
            )
        with zipfile.ZipFile(wheel) as opened:
            return [_unpack(published, opened, name, cache) for name in published.parts]


def _unpack(published: Published, wheel: zipfile.ZipFile, name: str, cache: Path | None) -> Path:
    target = _folder(name, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that one rename puts it there, whoever else fetches at the same time.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / name
        made.mkdir()
        published.parts[name](wheel, made)
        files = {str(p.relative_to(made)): _sha256(p) for p in sorted(made.rglob("*")) if p.is_file()}
        source = {
            "wheel": f"{published.package} {published.version}",
            "sha256": published.sha256,
            "licence": published.licence,
            "source": published.source,
            "files": files,
        }
        (made / _SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.replace(made, target)
        except OSError:  # another process was faster: the same wheel makes the same files
            if not is_here(name, cache):
                raise
    return target


def _download(published: Published, target: Path) -> Path:
    """The wheel, by pip, which checks its hash too."""
    requirements = target / "requirements.txt"
    requirements.write_text(
        f"{published.package}=={published.version} --hash=sha256:{published.sha256}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Others' Python and platform do not matter: nothing of the wheel is run.
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(target), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or result.stderr.strip().splitlines() or ["it brought nothing"])[0]
        raise FetchError(
            f"pip cannot download {published.package}=={published.version}: "
            f"{reason.removeprefix('ERROR: ')}; --archive takes a wheel from elsewhere"
        )
    return wheels[0]


def _folder(name: str, cache: Path | None) -> Path:
    published = find(name)
    root = cache_folder() if cache is None else cache
    return root / f"{published.package}-{published.version}" / name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""From the name of a corpus to a UTF-8 file on this machine, whose bytes are known.

A named corpus is looked for in the cache, then in the folder GPTEXP_DATA, then downloaded; wherever it
comes from, its SHA-256 must be the one below. So every machine learns from the same bytes.
"""

import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gptexp.data.cache import cache_folder, locked, replacing
from gptexp.data.settings import DataConfig
from gptexp.errors import UserError

log = logging.getLogger("gptexp")
TIMEOUT = 10.0  # seconds without an answer before the next address is tried


@dataclass(frozen=True)
class Source:
    """A public corpus: its file name, the SHA-256 of its bytes, and its addresses in order of preference."""

    file: str
    sha256: str
    urls: tuple[str, ...]


SOURCES = {
    "shakespeare": Source(
        "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://raw.githubusercontent.com/karpathy/ng-video-lecture/master/input.txt",
        ),
    ),
    "names": Source(
        "names.txt",
        "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
        ("https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",),
    ),
}


@dataclass(frozen=True)
class Corpus:
    """A text on disk."""

    name: str  # the corpus that is really used
    requested: str  # the corpus that was asked for; another one when the fallback had to step in
    path: Path  # the UTF-8 file
    sha256: str  # of the file's bytes, in hexadecimal
    documents: bool  # whether to read it as one document a line; the fallback is running text whatever was asked for


def find_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` asks for, downloaded if need be; or its fallback, with a warning.

    Raises:
        UserError: a file that is missing, empty or unreadable; a named corpus out of reach when
            `config.offline_fallback` is None; a cache that cannot be written when it has to be.
    """
    if config.name == "file":
        return _file(config)
    if config.name == "pydocs":
        return _pydocs("pydocs", config.documents)
    source = SOURCES[config.name]
    path, failures = _fetched(source)
    if path is not None:
        return Corpus(config.name, config.name, path, source.sha256, config.documents)
    if config.offline_fallback is None:
        raise UserError(
            f"data.name={config.name}: {source.file} could not be downloaded ({'; '.join(failures)}); "
            f"set GPTEXP_DATA to a folder that holds it, or use data=pydocs, or data=file data.path=FILE"
        )
    rule = "=" * 100
    listed = "".join(f"  {failure}\n" for failure in failures)
    log.warning(
        f"{source.file} could not be downloaded:\n{rule}\n{listed}"
        "THIS RUN READS ANOTHER TEXT INSTEAD: the documentation of Python (data=pydocs).\n"
        f"Its results cannot be compared with those of data={config.name}.\n"
        f"For the real text, set GPTEXP_DATA to a folder that holds {source.file}.\n{rule}"
    )
    return _pydocs(config.name, documents=False)


def _file(config: DataConfig) -> Corpus:
    path = Path(config.path or "").expanduser().absolute()
    try:
        if path.is_file() and path.stat().st_size:
            return Corpus("file", "file", path, _sha256(path), config.documents)
        problem = "empty" if path.is_file() else "not a file" if path.exists() else "no such file"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UserError(f"data.path={config.path}: {problem}; allowed: a UTF-8 text file that is not empty")


def _pydocs(requested: str, documents: bool) -> Corpus:
    """The documentation that comes with Python, as a file in the cache like any other corpus."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("data.name=pydocs: this Python comes without pydoc_data; allowed: data=file") from error
    lines = "\n\n".join(topics[key] for key in sorted(topics)).split("\n")
    text = ("\n".join(line.rstrip() for line in lines) + "\n").encode()
    sha256 = hashlib.sha256(text).hexdigest()
    # The text differs between versions of Python, which may share one cache: so its hash is in its name.
    path = cache_folder() / f"pydocs-{sha256[:12]}.txt"
    if not _holds(path, sha256):
        with locked(path), replacing(path) as file:
            file.write(text)
    return Corpus("pydocs", requested, path, sha256, documents)


def _fetched(source: Source) -> tuple[Path | None, list[str]]:
    """A file with the bytes of `source`; or None, and the reason why each address failed."""
    cached = cache_folder() / source.file
    if _holds(cached, source.sha256):
        return cached, []
    given = os.environ.get("GPTEXP_DATA")
    if given:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            log.warning("GPTEXP_DATA=%s: no such folder; going on without it", given)
        elif _holds(folder / source.file, source.sha256):
            return folder / source.file, []
    with locked(cached):  # pooch sees whether another process fetched it while this one waited
        return _downloaded(source, cached)


def _downloaded(source: Source, path: Path) -> tuple[Path | None, list[str]]:
    """Try each address in turn; only the right bytes ever take the place of `path`."""
    import pooch  # type: ignore[import-untyped, unused-ignore]  # here, because it is slow to import
    from requests.exceptions import HTTPError, RequestException, Timeout

    pooch.get_logger().setLevel("ERROR")  # it announces every download; the progress bar already does
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT)
    failures = []
    for url in source.urls:
        try:
            pooch.retrieve(url, f"sha256:{source.sha256}", path.name, path.parent, downloader=downloader)
            return path, []
        except HTTPError as error:
            reason = f"HTTP status {error.response.status_code if error.response is not None else 'unknown'}"
        except Timeout:
            reason = f"no answer within {TIMEOUT:g} seconds"
        except RequestException:
            reason = "no connection"
        except ValueError:
            reason = "wrong SHA-256"
        failures.append(f"{url}: {reason}")
    return None, failures


def _holds(path: Path, sha256: str) -> bool:
    """Whether the file is there with the right bytes; wrong bytes are worth a line on the way to the next source."""
    try:
        found = _sha256(path) if path.is_file() else ""
        problem = f"wrong SHA-256 {found[:12]}... instead of {sha256[:12]}..." if found not in ("", sha256) else ""
    except OSError as error:
        found, problem = "", f"cannot be read ({error.strerror})"
    if problem:
        log.warning("%s: %s; trying the next source", path, problem)
    return found == sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

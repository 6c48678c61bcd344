"""From the name of a corpus to a UTF-8 file on this machine, with a known checksum."""

import hashlib
import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from gptexp.config.sections import DataConfig
from gptexp.data.cache import cache_folder, locked, replacing
from gptexp.data.files import Part, find_parts, is_json, sha256_of
from gptexp.errors import UserError
from gptexp.registry import CORPORA

log = logging.getLogger("gptexp")
TIMEOUT = 10.0  # seconds without an answer before the next address is tried


@dataclass(frozen=True)
class Corpus:
    """A text on disk."""

    name: str  # the corpus that is used
    requested: str  # the corpus that was asked for, which differs if this is the fallback
    path: Path  # the UTF-8 file; or a folder or pattern of files
    sha256: str  # of the file's bytes, in hexadecimal; of several files, of everything that their text depends on
    several: tuple[Part, ...] = ()  # the files, if it is not one of plain text
    val_files: int = 0  # so many of them, the last ones, are for validation
    field: str = "text"  # the key of a line's text in files of JSON lines

    @property
    def parts(self) -> tuple[Part, ...]:
        """The files."""
        return self.several or (Part(self.path, self.sha256),)


class Unreachable(Exception):
    """A corpus cannot be downloaded; it has one argument per address, with the reason."""


class Source:
    """Base of every corpus; its constructor takes no arguments.

    Attributes:
        task: the default task for the corpus.
        terminator: the symbol that ends a document, for a task of documents.
    """

    task = "text"
    terminator = "\n"

    def find(self, data: DataConfig) -> tuple[Path, str]:
        """The file and its SHA-256, in hexadecimal.

        Raises:
            UserError: for a file that is missing, empty or unreadable, or a cache that cannot be written.
            Unreachable: when the corpus cannot be downloaded.
        """
        raise NotImplementedError

    def corpus(self, data: DataConfig) -> Corpus:
        """What was found; errors as of `find`."""
        return Corpus(data.name, data.name, *self.find(data))


class Download(Source):
    """A public text: from the cache, else from the folder GPTEXP_DATA, else downloaded.

    Attributes:
        file: its name.
        sha256: of its bytes, so that every machine learns from the same text.
        urls: its addresses, in order of preference.
    """

    file: str
    sha256: str
    urls: tuple[str, ...]

    def find(self, data: DataConfig) -> tuple[Path, str]:
        """As its base."""
        cached = cache_folder() / self.file
        if _holds(cached, self.sha256):
            return cached, self.sha256
        given = os.environ.get("GPTEXP_DATA")
        if given:
            folder = Path(given).expanduser().absolute()
            if not folder.is_dir():
                log.warning("GPTEXP_DATA=%s: no such folder; it is ignored", given)
            elif _holds(folder / self.file, self.sha256):
                return folder / self.file, self.sha256
        with locked(cached):  # another process may download it meanwhile; pooch checks that
            self._download(cached)
        return cached, self.sha256

    def _download(self, path: Path) -> None:
        """Try each address in turn; only the right bytes replace `path`."""
        import pooch  # type: ignore[import-untyped, unused-ignore]  # here, because it is slow to import
        from requests.exceptions import HTTPError, RequestException, Timeout

        pooch.get_logger().setLevel("ERROR")  # no message for each download: there is a progress bar
        downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT)
        failures = []
        for url in self.urls:
            try:
                pooch.retrieve(url, f"sha256:{self.sha256}", path.name, path.parent, downloader=downloader)
                return
            except HTTPError as error:
                reason = f"HTTP status {error.response.status_code if error.response is not None else 'unknown'}"
            except Timeout:
                reason = f"no answer within {TIMEOUT:g} seconds"
            except RequestException:
                reason = "no connection"
            except ValueError:
                reason = "wrong SHA-256"
            failures.append(f"{url}: {reason}")
        raise Unreachable(*failures)


class Generated(Source):
    """A text that a program writes, kept in the cache."""

    def text(self) -> str:
        """The whole text, the same at each call."""
        raise NotImplementedError

    def find(self, data: DataConfig) -> tuple[Path, str]:
        """As its base."""
        content = self.text().encode()
        sha256 = hashlib.sha256(content).hexdigest()
        # Versions of the program may share a cache, so the hash of the text is in the file's name.
        path = cache_folder() / f"{type(self).__name__.lower()}-{sha256[:12]}.txt"
        if not _holds(path, sha256):
            with locked(path), replacing(path) as file:
                file.write(content)
        return path, sha256


@CORPORA.register("shakespeare")
class Shakespeare(Download):
    """Tiny Shakespeare: 1,115,394 characters, 65 distinct ones."""

    file = "tinyshakespeare.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    urls = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://raw.githubusercontent.com/karpathy/ng-video-lecture/master/input.txt")  # fmt: skip


@CORPORA.register("names")
class Names(Download):
    """32,033 first names, one per line: documents of 27 distinct symbols, including the terminator."""

    task, terminator = "documents", "."
    file = "names.txt"
    sha256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
    urls = ("https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",)


@CORPORA.register("pydocs")
class Pydocs(Generated):
    """The language reference that comes with Python: about 465,000 characters, available offline."""

    def text(self) -> str:
        """The topics of Python's help, in alphabetical order."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError("data.name=pydocs: this Python comes without pydoc_data; allowed: data=file") from error
        lines = "\n\n".join(topics[key] for key in sorted(topics)).split("\n")
        return "\n".join(line.rstrip() for line in lines) + "\n"


@CORPORA.register("file")
class File(Source):
    """Any UTF-8 text, in one file or in many: `data=file data.path=TEXT`."""

    def corpus(self, data: DataConfig) -> Corpus:
        """As its base; one plain file is as its bytes are."""
        given = data.path or ""
        parts, path = find_parts(given, "data.path"), Path(given).expanduser().absolute()
        val_parts = find_parts(data.val_path, "data.val_path") if data.val_path is not None else []
        if shared := {p.path for p in parts} & {p.path for p in val_parts}:
            raise UserError(f"data.val_path={data.val_path}: {min(shared)} is in data.path={data.path}, too; "
                            "allowed: a text of its own")  # fmt: skip
        together = (*parts, *val_parts)
        coded = [p.path.suffix for p in together if is_json(p.path) or p.path.suffix == ".gz"]
        if data.field != DataConfig.field and not any(is_json(p.path) for p in together):
            raise UserError(f"data.field={data.field}: has no effect without a .jsonl file in data.path={data.path}")
        if len(together) == 1 and not coded:
            return Corpus(data.name, data.name, path, parts[0].sha256)
        whole = json.dumps([[p.sha256 for p in together], coded, len(val_parts), data.field])
        return Corpus(data.name, data.name, path, hashlib.sha256(whole.encode()).hexdigest(), together,
                      len(val_parts), data.field)  # fmt: skip


@CORPORA.register("none")
class NoCorpus(Source):
    """No text: for a task that makes its own problems, such as arithmetic."""

    def find(self, data: DataConfig) -> tuple[Path, str]:
        """A file that is always empty."""
        return Path(os.devnull), hashlib.sha256().hexdigest()


def find_corpus(data: DataConfig) -> Corpus:
    """The corpus that the settings ask for, downloaded if necessary; or its fallback, with a warning.

    Raises:
        UserError: a file that is missing, empty or unreadable; a corpus that cannot be downloaded when
            `data.offline_fallback` is None; a cache that cannot be written.
    """
    source = CORPORA[data.name].made()
    try:
        found: Corpus = source.corpus(data)
        return found
    except Unreachable as error:
        failures = error.args
    if data.offline_fallback is None:
        raise UserError(f"data.name={data.name}: {source.file} could not be downloaded ({'; '.join(failures)}); "
                        "set GPTEXP_DATA to a folder that holds it, or use data=pydocs, or data=file "
                        "data.path=FILE")  # fmt: skip
    rule = "=" * 100
    listed = "".join(f"  {failure}\n" for failure in failures)
    log.warning(
        f"{source.file} could not be downloaded:\n{rule}\n{listed}"
        "THIS RUN READS ANOTHER TEXT INSTEAD: the documentation of Python (data=pydocs).\n"
        f"Its results cannot be compared with those of data={data.name}.\n"
        f"For the real text, set GPTEXP_DATA to a folder that holds {source.file}.\n{rule}"
    )
    return replace(find_corpus(replace(data, name=data.offline_fallback)), requested=data.name)


def _holds(path: Path, sha256: str) -> bool:
    """Whether the file exists with the right bytes; logs a warning if its bytes are wrong."""
    try:
        found = sha256_of(path) if path.is_file() else ""
        problem = f"wrong SHA-256 {found[:12]}... instead of {sha256[:12]}..." if found not in ("", sha256) else ""
    except OSError as error:
        found, problem = "", f"cannot be read ({error.strerror})"
    if problem:
        log.warning("%s: %s; trying the next source", path, problem)
    return found == sha256

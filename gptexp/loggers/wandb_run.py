"""Weights & Biases without questions: online with an API key, else offline. Imports no torch."""

import logging
import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

log = logging.getLogger("gptexp")


def has_api_key() -> bool:
    """Whether W&B can log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in places:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def open_wandb(
    folder: Path, mode: str = "auto", settings: Mapping[str, Any] | None = None, patience: float = 60, **options: Any
) -> Any:
    """Begin a W&B run, offline if there is no key or no server.

    Args:
        folder: the run's files go to wandb/ in it.
        mode: "auto", "online" or "offline".
        settings: of `wandb.Settings`.
        patience: seconds that the end of the run waits for the server. The environment's WANDB_FINISH_TIMEOUT and, at
            the start, WANDB_INIT_TIMEOUT take precedence.
        options: of `wandb.init`, such as the project and the name.

    Returns:
        the `wandb.Run`.

    Raises:
        wandb.errors.UsageError: for options that W&B does not take.
    """
    wanted: Any = mode if mode != "auto" else os.environ.get("WANDB_MODE", "online")
    if wanted == "online" and not has_api_key():  # logging in would ask a question
        if "online" in (mode, os.environ.get("WANDB_MODE")):
            log.warning("W&B has no API key; the run is kept offline")
        wanted = "offline"
    if wanted == "offline":  # or W&B reports errors to its maker, and waits where the network does not answer
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    chosen: dict[str, Any] = {
        "console": "off", "silent": True, "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT") or 30),
        "finish_timeout": float(os.environ.get("WANDB_FINISH_TIMEOUT") or patience), "finish_timeout_raises": True,
    }  # fmt: skip
    options |= {"reinit": "finish_previous", "dir": str(folder.absolute()),
                "resume": "allow",  # so `wandb sync` joins the parts of a resumed run, too
                "settings": wandb.Settings(**chosen | dict(settings or {}))}  # fmt: skip
    run: Any = None
    if wanted != "offline":
        try:
            wandb.setup(wandb.Settings(silent=True))  # without a line on where the key is
            run = wandb.init(mode=wanted, **options)
        except wandb.errors.UsageError:
            raise
        except Exception as error:  # an unreachable server must not cost a run
            log.warning("W&B cannot be reached (%s); the run is kept offline", str(error).split("\n")[0])
            _end_service()  # it takes the run's id as used
    if run is None:
        try:
            run = wandb.init(mode="offline", **options)
        except ConnectionError:  # W&B's process has been killed since the last run
            _end_service()
            run = wandb.init(mode="offline", **options)
    if run.offline:
        log.info("W&B: offline; upload it later with: wandb sync %s", _folder(run, folder))
    elif not run.disabled:
        log.info("W&B: %s", run.url)
    return run


def close_wandb(run: Any, succeeded: bool) -> None:
    """End a W&B run as finished or failed, and wait for the server. What it has not taken in time stays on disk."""
    try:
        run.finish(exit_code=0 if succeeded else 1)
    except ConnectionError:
        log.warning("W&B's process has ended; upload what it has written with: wandb sync %s", _folder(run))
        _end_service()
    except TimeoutError:
        log.warning("W&B has not taken everything in time; upload the rest with: wandb sync %s", _folder(run))
    except Exception as error:
        log.warning("W&B: %s", str(error).split("\n")[0])


def _end_service() -> None:
    """Leave W&B's own process, so that the next run gets a new one."""
    import wandb

    with suppress(Exception):  # it may already be gone
        wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # may come from the program that began this one


def _folder(run: Any, parent: Path | None = None) -> Path:
    """The folder that `wandb sync` uploads; spelled as `parent` is, if given."""
    folder = Path(run.dir).parent
    return parent / "wandb" / folder.name if parent else folder

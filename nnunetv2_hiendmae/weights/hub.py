"""`hf://ORG/REPO[@REVISION][/FILE]`: files on the Hugging Face Hub, wherever an encoder file or checkpoint is taken.

huggingface_hub downloads into its cache, looks there first, and finds the user's token; its variables hold (HF_HOME,
HF_HUB_OFFLINE, HF_TOKEN). It is imported where such a name is given, and asked for single files alone: nothing of a
repository is executed, and what comes is read like any other file.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable, some
from nnunetv2_hiendmae.files import ENCODER, sha256

logger = logging.getLogger(__name__)

# pathlib makes one slash of two
_START = re.compile("hf:(/+|$)")
_NAME = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
_FORMS = "hf://ORG/REPO, hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE"
# what the Hub calls repositories that hold no models
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# as huggingface_hub lays out its cache
_CACHED = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)")
_SHA256 = re.compile("[0-9a-f]{64}")


def local_file(name: str | Path) -> Path:
    """The path of a file: what is no hf:// name as it is, else that in the cache of huggingface_hub, which downloads it
    if need be. Its name with the commit, path and sha256 are logged.

    Without FILE it is the repository's encoder.safetensors, else its only file of weights.

    Raises:
        UserError: no such name, repository, revision or file, no access, no connection while it is not in the cache,
            or a damaged file in the cache.
    """
    if re.match("https?:/", str(name)):
        raise UserError(f"{printable(name)} is the address of a page, needed a file or a name: {_FORMS}")
    start = _START.match(str(name))
    if not start:
        return Path(name)
    rest = str(name)[start.end() :].rstrip("/")
    match = _NAME.fullmatch(rest)
    if not match or match[1].split("/")[0] in _OTHER_KINDS:
        raise UserError(f"hf://{printable(rest)} names no file of a model on the Hugging Face Hub, needed {_FORMS}")
    repo, revision, file = match.groups()
    with _telling(repo, f"hf://{rest}"):
        path = _fetch(repo, revision and unquote(revision), file)
    digest = sha256(path)
    stored = path.resolve().name
    if _SHA256.fullmatch(stored) and stored != digest:
        raise UserError(f"{path} is damaged: its sha256 is {digest}; remove {path.resolve()} and run the command again")
    logger.info(f"{source_name(path)}: {path}, sha256 {digest}")
    return path


def hub_name(path: Path) -> str | None:
    """hf:// name, with the commit, of a file in the cache of huggingface_hub; None: it is not there."""
    match = _CACHED.fullmatch(path.absolute().as_posix())
    return match and "hf://{}/{}@{}/{}".format(*match.groups())


def source_name(path: Path) -> str:
    """What a file is called in what is made of it: its hf:// name with the commit, else its name without folders."""
    return hub_name(path) or path.name


def lasting_path(path: Path) -> Path:
    """Absolute path under which a file will be found again; in the cache that of its commit, not that of its bytes."""
    return path.absolute() if hub_name(path) else path.resolve()


def _fetch(repo: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # it prints its warnings itself: the root logger would print them once more
    hub_logging.disable_propagation()
    try:
        return Path(hf_hub_download(repo, file or ENCODER, revision=revision))
    except EntryNotFoundError as e:
        unreachable = isinstance(e, LocalEntryNotFoundError)
        # what the cache lacks the repository may have
        there = _cached(repo, revision) if unreachable else HfApi().list_repo_files(repo, revision=revision)
        weights = sorted(name for name in there if name.endswith(_SUFFIXES))
        if file is None and len(weights) == 1:
            return Path(hf_hub_download(repo, weights[0], revision=revision))
        listed = some(weights or sorted(there), most=8) or "nothing"
        if unreachable:
            raise UserError(_unreachable(repo, revision, file, listed, e)) from e
        wanted = file or f"{ENCODER} and not one file of weights alone"
        raise UserError(f"{repo} has no {printable(wanted)}, needed hf://{repo}/FILE with one of: {listed}") from e


def _cached(repo: str, revision: str | None) -> list[str]:
    """Files of a revision that the cache has."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        found = [r for r in scan_cache_dir(constants.HF_HUB_CACHE).repos if (r.repo_id, r.repo_type) == (repo, "model")]
    except CacheNotFound:
        return []
    wanted = revision or "main"
    return [
        file.file_path.relative_to(commit.snapshot_path).as_posix()
        for cached in found
        for commit in cached.revisions
        if wanted in (commit.commit_hash, *commit.refs)
        for file in commit.files
    ]


def _unreachable(repo: str, revision: str | None, file: str | None, listed: str, error: Exception) -> str:
    from huggingface_hub import constants

    at = f"@{quote(revision, safe='')}" if revision else ""
    name = f"hf://{repo}{at}/{file or ENCODER}"
    told = f"{printable(name)} is not in the cache {constants.HF_HUB_CACHE} (of this repository it has {listed})"
    if constants.HF_HUB_OFFLINE:
        return f"{told} and HF_HUB_OFFLINE forbids the network; run: unset HF_HUB_OFFLINE"
    why = printable(error.__cause__ or error, LONGEST_ERROR)
    return f"{told} and the Hub cannot be reached ({why}); run it again with a network, or where HF_HOME has the file"


@contextmanager
def _telling(repo: str, name: str) -> Iterator[None]:
    """What the Hub, the network or the cache refuse inside is told in one line."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as e:
        told = f"{name}: its authors give access to whom they choose; ask for it at {page}"
        raise UserError(f"{told}, then run: hf auth login") from e
    except errors.RepositoryNotFoundError as e:
        told = f"{name}: the Hub has no model {repo}, or a private one; look at {page}"
        raise UserError(f"{told}, or for a private one run: hf auth login") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{name}: {repo} has no such revision; see {page}/commits/main") from e
    except Exception as e:  # requests, httpx, xet and the disk have errors of their own, which differ between versions
        told = printable(f"{type(e).__name__}: {e}", LONGEST_ERROR)
        raise UserError(f"{name} could not be downloaded ({told}); run the same command again") from e

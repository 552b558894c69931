"""The Hugging Face hub: named files of one revision, downloaded, resumed, and compared with the hub's own checksums.

huggingface_hub makes the requests, so HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as everywhere. Its own downloads
never verify a checksum, and since version 2 they begin again after a kill: `download` does both.
"""

import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from runtime.errors import UserError
from runtime.files import flush, naming, reason

ATTEMPTS = 5  # times that a broken connection may bring nothing new before a download gives up
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR)


@dataclass(frozen=True)
class Remote:
    """What the hub records about a file: its size in bytes, and its sha256 (a large file) or git blob id."""

    bytes: int
    sha256: str | None
    blob_id: str | None

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob_id

    def matches(self, path: Path) -> bool:
        """Whether a local file has this content. Raises OSError."""
        if path.stat().st_size != self.bytes:
            return False
        with naming(path), path.open("rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            blob = hashlib.sha1(b"blob %d\0" % self.bytes)  # git's name of the content
            while block := file.read(1 << 20):
                blob.update(block)
            return blob.hexdigest() == self.blob_id


@dataclass(frozen=True)
class Revision:
    """One commit of a repository. repo_type is "model" or "dataset"."""

    repo: str
    name: str  # the branch that was asked for
    commit: str
    files: dict[str, Remote] = field(repr=False)
    repo_type: str = "model"


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn every error of the hub, the network and the disk in the block into a UserError of one line."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import OfflineModeIsEnabled

    where = f"{repo} on {constants.ENDPOINT}"
    try:
        yield
    except errors.GatedRepoError:
        message = f"{where} is gated: accept its terms on its page there, and set HF_TOKEN to a token of your account"
    except errors.RepositoryNotFoundError:
        message = f"there is no repository {where}, or it is private and HF_TOKEN does not open it"
    except errors.LocalTokenNotFoundError:
        message = f"{where} needs a token: set HF_TOKEN"
    except errors.RevisionNotFoundError:
        message = f"{where} has no revision {revision}"
    except errors.HFValidationError as error:
        message = f"{repo} is not the name of a repository: {_line(error)}"
    except OfflineModeIsEnabled:
        message = f"{where} cannot be asked: HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = "; set HF_TOKEN to a token that may do this" if status in (401, 403) else ""
        message = f"{where} answers with an error: {_line(error)}{advice}"
    except ValueError as error:  # a page of a proxy or a login instead of JSON
        message = f"{where} answers with what is not a hub's answer: {_line(error)}"
    except (OSError, errors.HTTPError) as error:
        if getattr(error, "errno", None) in DISK:
            message = f"{repo} cannot be stored: {reason(error)}"
        else:
            message = f"{where} cannot be reached: {_line(error)}"
    else:
        return
    raise UserError(message)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:300]


def branches(repo: str, repo_type: str = "model") -> list[str]:
    """The names of all branches. Raises UserError."""
    from huggingface_hub import HfApi

    with hub_errors(repo):
        return [branch.name for branch in HfApi().list_repo_refs(repo, repo_type=repo_type).branches]


def resolve(repo: str, revision: str, repo_type: str = "model") -> Revision:
    """The commit of a revision and what the hub records about each of its files. Raises UserError."""
    from huggingface_hub import HfApi

    with hub_errors(repo, revision):
        info = HfApi().repo_info(repo, revision=revision, repo_type=repo_type, files_metadata=True)
    files = {}
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or "\\" in file.rfilename or not file.rfilename.isprintable():
            raise UserError(f"{repo} names a file outside of its directory: {file.rfilename!r}")
        lfs = file.lfs.sha256 if file.lfs else None
        if file.size is None or not (lfs or file.blob_id):
            raise UserError(
                f"{repo}: the hub records no size or checksum of {file.rfilename}, so it cannot be verified"
            )
        files[file.rfilename] = Remote(file.size, lfs, file.blob_id)
    return Revision(repo, revision, info.sha, files, repo_type)


def download(revision: Revision, names: list[str], directory: Path) -> None:
    """Download files of a revision into a directory; those that are there with the right checksum stay.

    A file appears under its name when its checksum is right. Until then it is `.NAME.DIGEST.part`, from which the same
    call continues after a kill. Raises UserError, which names the file, and before the first download if there is no
    room for all.
    """
    with hub_errors(revision.repo, revision.name):
        missing, needed = [], 0
        for name in names:
            path, remote = directory / name, revision.files.get(name)
            if remote is None:
                raise UserError(f"{revision.repo} has no file {name} in revision {revision.name}")
            if path.exists() and remote.matches(path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            missing.append(name)
            part = _part(path, remote)
            needed += remote.bytes - (part.stat().st_size if part.exists() else 0)
        free = shutil.disk_usage(directory).free if missing else 0
        if needed > free:
            raise UserError(f"no room in {directory}: {needed / 1e9:.2f} GB to download, {free / 1e9:.2f} GB are free")
        for name in missing:
            _download(revision, name, directory / name)


def _part(path: Path, remote: Remote) -> Path:
    return path.with_name(f".{path.name}.{remote.digest[:12]}.part")


def _download(revision: Revision, name: str, path: Path) -> None:
    remote = revision.files[name]
    part = _part(path, remote)
    if part.exists() and part.stat().st_size > remote.bytes:
        part.unlink()
    with naming(part), part.open("ab") as file:
        request(revision, name, file, remote.bytes)
    if not remote.matches(part):
        part.unlink()
        raise UserError(
            f"{path}: what {revision.repo} sent is damaged, its checksum is not the one that the hub records; "
            f"run the same command again"
        )
    flush(part)
    part.rename(path)
    flush(path.parent)


def request(revision: Revision, name: str, file, end: int, shift: int = 0) -> None:
    """Append to an open local file until it has `end` bytes. Its byte k is byte k + shift of the remote file.

    Goes on where a broken connection stopped. Raises OSError or what huggingface_hub raises.
    """
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import OfflineModeIsEnabled, build_hf_headers

    url = hf_hub_url(revision.repo, name, repo_type=revision.repo_type, revision=revision.commit)
    vain = 0
    while (done := file.tell()) < end and vain < ATTEMPTS:
        # identity: a range of a compressed answer is not a range of the file
        headers = {
            **build_hf_headers(),
            "Accept-Encoding": "identity",
            "Range": f"bytes={done + shift}-{end + shift - 1}",
        }
        try:
            http_get(url, file, headers=headers, expected_size=end - done, displayed_filename=name)
        except (errors.HfHubHTTPError, OfflineModeIsEnabled):
            raise
        except (OSError, errors.HTTPError) as error:
            file.flush()
            vain = 0 if file.tell() > done else vain + 1
            if vain == ATTEMPTS or getattr(error, "errno", None) in DISK:
                raise
    if file.tell() != end:
        raise OSError(f"{name} has {file.tell()} bytes, not {end}")


def upload(repo: str, branch: str, folder: Path, private: bool) -> None:
    """Make a branch of a model repository hold exactly the files of a folder; both are created if they are missing.

    What the branch has already is not sent again. Raises UserError.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo, branch):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.create_branch(repo, branch=branch, exist_ok=True)
        there = resolve(repo, branch).files
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        stale = there.keys() - paths.keys() - {".gitattributes"}
        if not stale and all(name in there and there[name].matches(path) for name, path in paths.items()):
            return
        message = f"Upload {branch}"
        api.upload_folder(
            repo_id=repo, revision=branch, folder_path=folder, commit_message=message, delete_patterns=sorted(stale)
        )
        there = resolve(repo, branch).files
        for name, path in paths.items():
            if name not in there or not there[name].matches(path):
                raise UserError(f"{repo}, branch {branch}: {name} is not what was sent; run the same command again")

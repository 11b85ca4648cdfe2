"""A Hub on loopback: the endpoints that huggingface_hub calls to push and to download models, kept in memory.

By hand, to push to it and to look at what came:

    PYTHONPATH=. python tests/support/hub_server.py --port 8000 --folder /tmp/hub

Xet: huggingface_hub (1.x and 2.x) uploads through Xet whenever hf_xet is installed, and no answer of a server changes
that, so clients which are to upload LFS files need HF_HUB_DISABLE_XET=1. Files that `preupload` calls regular, and all
downloads (no X-Xet-Hash is sent), go over plain HTTP in any case.

Cards are refused as the Hub refuses them, as far as its rules are known:
- fields: https://huggingface.co/docs/hub/model-cards and github.com/huggingface/hub-docs, modelcard.md;
- base_model: github.com/huggingface/transformers/issues/33922; datasets: .../autotrain-advanced/issues/648;
- license: github.com/huggingface/huggingface_hub/issues/4218; language: jonatasgrosman/wav2vec2-sprint/issues/11;
- model-index: github.com/huggingface/hub-docs/pull/136.
In one thing this server is stricter: the value of a metric has to be a finite number, where the Hub lets texts pass.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "loopback"
TOKEN = "hf_loopbackTokenOfTheTests"  # of no use anywhere else

# What the .gitattributes of a new repository makes LFS files, whatever their size.
LFS_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.arrow", "*.parquet")
LFS_SIZE = 10 * 2**20

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""


# ---- cards ----


def card_problems(card: str) -> tuple[list[str], list[str]]:
    """Errors, for which a card is refused, and warnings."""
    block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---\s*([\r\n]|$)", card, re.DOTALL)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {' '.join(str(error).split())}"], []
    if not isinstance(metadata, dict):
        return ['"metadata" must be of type object'], []
    errors = [
        *_each(metadata, "base_model", _is_id, "Use a model id from https://hf.co/models."),
        *_each(metadata, "datasets", _is_id, "If possible, use a dataset id from https://hf.co/datasets."),
        *_each(metadata, "language", _is_language, "Use a code of ISO 639, or multilingual, or code."),
        *_each(metadata, "tags", bool, "Use a text."),
        *_each(metadata, "metrics", bool, "Use a text."),
        *_texts(metadata, "", optional=("library_name", "pipeline_tag", "license_name", "license_link")),
    ]
    licenses = metadata.get("license", [])
    for license_id in licenses if isinstance(licenses, list) else [licenses]:
        if license_id not in _LICENSES.split():
            errors.append(f'"license" must be one of [{", ".join(_LICENSES.split())}, array]')
    errors += _model_index_errors(metadata.get("model-index", []))
    return errors, []


def _each(metadata: dict[str, Any], key: str, valid: Callable[[str], Any], hint: str) -> Iterable[str]:
    value = metadata.get(key, [])
    named = [(f"{key}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else [(key, value)]
    for name, item in named:
        if not isinstance(item, str):
            yield f'"{name}" must be a string'
        elif key == "language" and item != item.lower():
            yield f'"{name}" must only contain lowercase characters'
        elif not valid(item):
            yield f'"{name}" with value "{item}" is not valid. {hint}'


def _is_id(text: str) -> bool:
    part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    return re.fullmatch(f"({part}/)?{part}", text) is not None and not re.search(r"--|\.\.|\.git$", text)


def _is_language(text: str) -> bool:
    return re.fullmatch("[a-z]{2,3}|multilingual|code", text) is not None


def _texts(values: Any, path: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> Iterable[str]:
    """Errors of an object whose values for these keys have to be texts."""
    for key in (*required, *optional):
        name = f"{path}.{key}" if path else key
        if key not in values:
            if key in required:
                yield f'"{name}" is required'
        elif not isinstance(values[key], str):
            yield f'"{name}" must be a string'
        elif not values[key]:
            yield f'"{name}" is not allowed to be empty'


def _model_index_errors(index: Any) -> Iterable[str]:
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        path = f"model-index[{i}]"
        if not isinstance(model, dict):
            yield f'"{path}" must be of type object'
            continue
        yield from _texts(model, path, required=("name",))
        results = model.get("results")
        if not isinstance(results, list):
            yield f'"{path}.results" ' + ("is required" if results is None else "must be an array")
            continue
        for j, result in enumerate(results):
            yield from _result_errors(result, f"{path}.results[{j}]")


def _result_errors(result: Any, path: str) -> Iterable[str]:
    if not isinstance(result, dict):
        yield f'"{path}" must be of type object'
        return
    kinds = {"task": (dict, "of type object"), "dataset": (dict, "of type object"), "metrics": (list, "an array")}
    for key, (kind, called) in kinds.items():
        if key not in result:
            yield f'"{path}.{key}" is required'
        elif not isinstance(result[key], kind):
            yield f'"{path}.{key}" must be {called}'
        elif key == "task":
            yield from _texts(result[key], f"{path}.task", required=("type",), optional=("name",))
        elif key == "dataset":
            optional = ("config", "split", "revision")
            yield from _texts(result[key], f"{path}.dataset", required=("type", "name"), optional=optional)
        else:
            for k, metric in enumerate(result[key]):
                yield from _metric_errors(metric, f"{path}.metrics[{k}]")


def _metric_errors(metric: Any, path: str) -> Iterable[str]:
    if not isinstance(metric, dict):
        yield f'"{path}" must be of type object'
        return
    yield from _texts(metric, path, required=("type",), optional=("name", "config"))
    value = metric.get("value")
    if value is None:
        yield f'"{path}.value" is required'
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        yield f'"{path}.value" must be a number'


# ---- what is kept ----


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The id that git gives to what it keeps: of an LFS file, the pointer."""
        return _blob_id(self.pointer if self.lfs else self.content)

    @property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    """All files of the repository as this commit leaves it."""


@dataclass
class Repository:
    id: str
    private: bool
    branches: dict[str, list[Commit]]

    def commit(self, revision: str) -> Commit:
        """The commit of this id, or the last one of this branch."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in (commit for commits in self.branches.values() for commit in commits):
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        commits = self.branches.setdefault(branch, [])
        described = json.dumps([branch, len(commits), title, {path: file.blob_id for path, file in files.items()}])
        commits.append(Commit(hashlib.sha1(described.encode()).hexdigest(), title, files))
        return commits[-1]


@dataclass(frozen=True)
class Request:
    """One request as it was recorded; `size` counts the bytes of the body that were read, `status` 0 is no answer."""

    endpoint: str
    method: str
    path: str
    size: int
    status: int


@dataclass
class Fault:
    """What goes wrong at an endpoint, for the next `calls` of it."""

    endpoint: str
    status: int | None = None
    """Answer with this error."""
    drop: bool = False
    """Close the connection in the middle of the body."""
    delay: float = 0.0
    """Seconds before the answer."""
    until: str | None = None
    """No answer before this endpoint is called."""
    calls: float = math.inf


class HubError(Exception):
    def __init__(self, status: int, message: str, *, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": " ".join(message.split())} | ({"X-Error-Code": code} if code else {})
        self.details = details


@dataclass
class Call:
    """A request as a handler gets it."""

    query: dict[str, list[str]]
    headers: Message
    body: bytes
    authorized: bool

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = tuple(
    (endpoint, method, re.compile(pattern))
    for endpoint, method, pattern in (
        ("whoami", "GET", r"/api/whoami-v2"),
        ("validate", "POST", r"/api/validate-yaml"),
        ("create", "POST", r"/api/repos/create"),
        ("delete", "DELETE", r"/api/repos/delete"),
        ("info", "GET", rf"/api/models/{_REPO}(/revision/{_REVISION})?"),
        ("refs", "GET", rf"/api/models/{_REPO}/refs"),
        ("tree", "GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?"),
        ("paths_info", "POST", rf"/api/models/{_REPO}/paths-info/{_REVISION}"),
        ("branch", "POST", rf"/api/models/{_REPO}/branch/{_REVISION}"),
        ("preupload", "POST", rf"/api/models/{_REPO}/preupload/{_REVISION}"),
        ("commit", "POST", rf"/api/models/{_REPO}/commit/{_REVISION}"),
        ("lfs_batch", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
        ("lfs_put", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
        ("lfs_verify", "POST", rf"/{_REPO}\.git/info/lfs/objects/verify"),
        ("resolve", "GET|HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)"),
    )
)
ENDPOINTS = tuple(endpoint for endpoint, _, _ in _ROUTES)
# Who has no token may call these; an invalid one is refused everywhere. Uploads go to signed addresses.
_OPEN = {"validate", "info", "refs", "tree", "paths_info", "lfs_put", "resolve"}


class HubServer(ThreadingHTTPServer):
    """Serves from its making on, in threads of its own, until `close()`; `with` closes it.

    Args:
        port: 0 for any that is free.
        folder: where the files of every branch are also written, at each commit.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, *, folder: Path | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.lock = threading.Lock()
        self.reset()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def reset(self) -> None:
        """Forget repositories, requests and faults."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Contents of LFS files by their SHA-256, whether or not they were committed."""
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lfs_names = LFS_NAMES
        self.errors: list[str] = []
        """Tracebacks of what went wrong in the server itself."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def __exit__(self, *args: object) -> None:
        self.close()

    def fault(self, endpoint: str, **fault: Any) -> None:
        """Let the next calls of one of `ENDPOINTS` go wrong; see `Fault`."""
        self.faults.append(Fault(endpoint, **fault))
        for name in (endpoint, self.faults[-1].until or endpoint):
            if name not in ENDPOINTS:
                raise ValueError(f"{name!r} is no endpoint: it must be one of {', '.join(ENDPOINTS)}")

    def next_fault(self, endpoint: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.endpoint == endpoint and fault.calls > 0:
                    fault.calls -= 1
                    return fault
        return None

    def was_called(self, endpoint: str) -> bool:
        with self.lock:
            return any(request.endpoint == endpoint for request in self.requests)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository."""
        return {path: file.content for path, file in self.repositories[repo].commit(revision).files.items()}

    def titles(self, repo: str, branch: str = "main") -> list[str]:
        """The first lines of the messages of all commits, without the one that makes a repository."""
        return [commit.title for commit in self.repositories[repo].branches[branch][1:]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client may hang up whenever it likes.
        if not isinstance(sys.exception(), ConnectionError):
            self.errors.append(traceback.format_exc())

    # ---- endpoints ----

    def answer(self, endpoint: str, call: Call, **names: str) -> Answer:
        with self.lock:
            if "Authorization" in call.headers and not call.authorized:
                raise HubError(401, "Invalid credentials in Authorization header")
            if endpoint not in _OPEN and not call.authorized:
                raise HubError(401, "Invalid username or password.")
            repo = names.pop("repo", None)
            if repo is not None:
                return getattr(self, f"_{endpoint}")(call, self._repository(repo, call), **names)
            return getattr(self, f"_{endpoint}")(call, **names)

    def _repository(self, name: str, call: Call) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not call.authorized):
            # Without a token, what is private looks as what is not there.
            raise HubError(404 if call.authorized else 401, "Repository not found", code="RepoNotFound")
        return repository

    def _whoami(self, call: Call) -> Answer:
        token = {"displayName": "tests", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
        return Answer.json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": token}})

    def _validate(self, call: Call) -> Answer:
        errors, warnings = card_problems(call.json()["content"])
        status = 400 if errors else 200
        if call.headers.get("Accept") == "text/plain":
            return Answer("\n".join(errors or warnings).encode(), status)
        listed = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        return Answer.json(listed, status)

    def _create(self, call: Call) -> Answer:
        wanted = call.json()
        owner = wanted.get("organization") or USER
        if owner != USER:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if wanted.get("type", "model") != "model":
            raise HubError(400, "this server has models only")
        repo = f"{owner}/{wanted['name']}"
        made = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            raise HubError(409, "You already created this model repo", **made)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.repositories[repo] = Repository(repo, private, {})
        attributes = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in self.lfs_names)
        self._commit_files(repository, "main", "initial commit", {".gitattributes": File(attributes.encode(), False)})
        return Answer.json(made)

    def _delete(self, call: Call) -> Answer:
        wanted = call.json()
        repository = self._repository(f"{wanted.get('organization') or USER}/{wanted['name']}", call)
        del self.repositories[repository.id]
        return Answer()

    def _info(self, call: Call, repository: Repository, revision: str | None = None) -> Answer:
        commit = repository.commit(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        shown = {"id": repository.id, "modelId": repository.id, "sha": commit.oid, "private": repository.private}
        return Answer.json(shown | {"tags": [], "downloads": 0, "likes": 0, "gated": False, "siblings": siblings})

    def _refs(self, call: Call, repository: Repository) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in repository.branches.items()
        ]
        return Answer.json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def _tree(self, call: Call, repository: Repository, revision: str, path: str | None = None) -> Answer:
        entries = _entries(repository.commit(revision))
        if path is not None and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {revision}", code="EntryNotFound")
        folder = PurePosixPath(path or ".")
        recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return Answer.json(
            [
                entry
                for name, entry in entries.items()
                if (folder in PurePosixPath(name).parents if recursive else PurePosixPath(name).parent == folder)
            ]
        )

    def _paths_info(self, call: Call, repository: Repository, revision: str) -> Answer:
        entries = _entries(repository.commit(revision))
        paths = parse_qs(call.body.decode()).get("paths", [])
        return Answer.json([entries[path.rstrip("/")] for path in paths if path.rstrip("/") in entries])

    def _branch(self, call: Call, repository: Repository, revision: str) -> Answer:
        if revision in repository.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        start = repository.commit(call.json().get("startingPoint") or "main")
        commits = next(commits for commits in repository.branches.values() if start in commits)
        repository.branches[revision] = commits[: commits.index(start) + 1]
        return Answer()

    def _preupload(self, call: Call, repository: Repository, revision: str) -> Answer:
        present = repository.commit(revision).files
        files = []
        for file in call.json()["files"]:
            path, size = file["path"], file["size"]
            lfs = size >= LFS_SIZE or any(fnmatch(path, name) for name in self.lfs_names)
            known = present.get(path)
            # What the client compares: the SHA-256 of an LFS file, else git's id.
            oid = (known.sha256 if known.lfs else known.blob_id) if known is not None else None
            uploaded = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append(uploaded | ({"oid": oid} if oid else {}))
        return Answer.json({"files": files})

    def _lfs_batch(self, call: Call, repository: Repository) -> Answer:
        wanted = call.json()
        if wanted["operation"] != "upload" or "basic" not in wanted["transfers"]:
            raise HubError(422, "this server takes basic uploads only")
        objects = []
        for item in wanted["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.url}/{repository.id}.git/info/lfs/objects/verify"},
            }
            objects.append(item | ({} if item["oid"] in self.objects else {"actions": actions}))
        return Answer.json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, call: Call, oid: str) -> Answer:
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the SHA-256 that was announced")
        self.objects[oid] = call.body
        return Answer()

    def _lfs_verify(self, call: Call, repository: Repository) -> Answer:
        wanted = call.json()
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "there is no such object of this size")
        return Answer()

    def _commit(self, call: Call, repository: Repository, revision: str) -> Answer:
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        lines = [json.loads(line) for line in call.body.splitlines()]
        if not lines or lines[0]["key"] != "header":
            raise HubError(400, "a commit begins with its header")
        header = lines[0]["value"]
        parent = repository.commit(revision)
        if header.get("parentCommit") not in (None, parent.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        card = files.get("README.md")
        if card is not None and card != parent.files.get("README.md"):
            errors, _ = card_problems(card.content.decode())
            if errors:
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        commit = self._commit_files(repository, revision, header["summary"], files)
        url = f"{self.url}/{repository.id}/commit/{commit.oid}"
        return Answer.json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        path = value["path"].rstrip("/")
        if any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, f"{path} is no path of a repository")
        if key == "file":
            if value["encoding"] != "base64":
                raise HubError(400, f"{path}: no such encoding")
            files[path] = File(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            if len(self.objects.get(value["oid"], b"")) != value["size"]:
                raise HubError(400, f"{path}: its LFS object was not uploaded")
            files[path] = File(self.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", code="EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"{key}: no such operation")

    def _commit_files(self, repository: Repository, branch: str, title: str, files: dict[str, File]) -> Commit:
        commit = repository.add(branch, title, files)
        if self.folder is not None:
            for path, file in files.items():
                target = self.folder / repository.id / branch / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.content)
        return commit

    def _resolve(self, call: Call, repository: Repository, revision: str, path: str) -> Answer:
        commit = repository.commit(revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            error = HubError(404, "Entry not found", code="EntryNotFound")
            error.headers |= headers
            raise error
        etag = file.sha256 if file.lfs else file.blob_id
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(file.content))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
        if part is None:
            return Answer(file.content, 200, headers)
        start, end = int(part[1]), min(int(part[2] or len(file.content)), len(file.content) - 1)
        if start > end:
            raise HubError(416, "no such range")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(file.content)}"
        return Answer(file.content[start : end + 1], 206, headers)


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit as `tree` and `paths-info` show them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        for folder in PurePosixPath(path).parents[:-1]:
            entries[str(folder)] = {"type": "directory", "path": str(folder), "oid": _blob_id(str(folder).encode())}
        entries[path] = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content)}
        if file.lfs:
            entries[path]["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return entries


# ---- HTTP ----


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body of an answer leave together

    def handle_method(self) -> None:
        address = urlsplit(self.path)
        endpoint, names = "unknown", {}
        for name, methods, pattern in _ROUTES:
            found = pattern.fullmatch(address.path)
            if found and self.command in methods.split("|"):
                endpoint, names = name, {key: unquote(value) for key, value in found.groupdict().items() if value}
                break
        size = int(self.headers.get("Content-Length", 0))
        fault = self.server.next_fault(endpoint)
        if fault is not None and fault.drop:
            self.rfile.read(size // 2)
            self._record(endpoint, size // 2, 0)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(size)
        if fault is not None:
            time.sleep(fault.delay)
            while fault.until is not None and not self.server.was_called(fault.until):
                time.sleep(0.01)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        call = Call(parse_qs(address.query), self.headers, body, authorized)
        try:
            if fault is not None and fault.status is not None:
                texts = {401: "Invalid credentials in Authorization header", 403: "Forbidden: no write access"}
                raise HubError(fault.status, texts.get(fault.status, "something is broken on purpose"))
            if endpoint == "unknown":
                raise HubError(404, f"this server does not have {self.command} {address.path}")
            answer = self.server.answer(endpoint, call, **names)
        except HubError as error:
            answer = Answer.json({"error": str(error)} | error.details, error.status)
            answer.headers |= error.headers
        except Exception:
            self.server.errors.append(traceback.format_exc())
            answer = Answer.json({"error": "internal error"}, 500)
        self._record(endpoint, size, answer.status)
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_method  # noqa: N815

    def _record(self, endpoint: str, size: int, status: int) -> None:
        with self.server.lock:
            self.server.requests.append(Request(endpoint, self.command, self.path, size, status))

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A Hub on loopback, to push models to and to download them from.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--folder", type=Path, help="where what is pushed is also written")
    options = parser.parse_args(arguments)
    with HubServer(options.port, folder=options.folder) as server:
        print(f"export HF_ENDPOINT={server.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        try:
            server.thread.join()
        except KeyboardInterrupt:
            shown = ", ".join(f"{repo}: {len(server.titles(repo))} commits" for repo in server.repositories)
            print(f"\n{shown or 'nothing was pushed'}")


if __name__ == "__main__":
    main()

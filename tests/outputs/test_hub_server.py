"""The Hub of these tests, as huggingface_hub's own client finds it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.utils._http
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import hub_server
from hub_server import ENDPOINTS, TOKEN, HubServer, card_problems

REPO = "loopback/model"
WEIGHTS = bytes(range(256)) * 300


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub as these tests need it, whatever its environment."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", impatient)
    huggingface_hub.close_session()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "empty.bin").write_bytes(b"")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    return folder


def endpoints(hub: HubServer) -> list[str]:
    return [request.endpoint for request in hub.requests]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("mode", "xet"),
    [("regular", False), ("lfs", False), ("regular", True)],
    ids=["regular", "lfs", "regular_where_xet_is"],
)
def test_what_is_pushed_comes_back(
    hub: HubServer, api: HfApi, folder: Path, tmp_path: Path, mode: str, xet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if xet:
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    if mode == "regular":
        hub.lfs_names = ()
    api.create_repo(REPO)

    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="all of it")

    assert hub.titles(REPO) == ["all of it"]
    assert {path: hub.files(REPO)[path] for path in contents(folder)} == contents(folder)
    assert ("lfs_put" in endpoints(hub)) == ("lfs_verify" in endpoints(hub)) == (mode == "lfs")
    assert hub.repositories[REPO].commit("main").files["model.safetensors"].lfs == (mode == "lfs")
    info = api.model_info(REPO)
    assert (info.id, info.sha, info.private) == (REPO, commit.oid, False)
    assert {file.rfilename for file in info.siblings} == set(hub.files(REPO))
    local = snapshot_download(REPO, endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache")
    assert contents(Path(local)) == hub.files(REPO)
    assert hub.files(REPO, commit.oid) == hub.files(REPO)


def test_what_is_there_is_not_sent_again(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.titles(REPO)) == 1
    assert "commit" not in endpoints(hub)
    assert "lfs_put" not in endpoints(hub)

    (folder / "config.json").write_text('{"changed": true}')
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="config")
    assert endpoints(hub).count("commit") == 1
    assert "lfs_put" not in endpoints(hub)
    first, second = hub.repositories[REPO].branches["main"][1:]
    assert first.files["config.json"].content == b"{}"  # what was there stays there
    assert second.files["config.json"].content == b'{"changed": true}'
    assert second.files["model.safetensors"] == first.files["model.safetensors"]


def test_files_folders_and_branches(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [entry.path for entry in api.list_repo_tree(REPO)] == sorted(
        {*(set(hub.files(REPO)) - {"sub/empty.bin"}), "sub"}
    )
    assert [entry.path for entry in api.list_repo_tree(REPO, "sub")] == ["sub/empty.bin"]
    assert {"sub", "sub/empty.bin"} < {entry.path for entry in api.list_repo_tree(REPO, recursive=True)}
    weights, absent = [*api.get_paths_info(REPO, ["model.safetensors"]), api.get_paths_info(REPO, ["nothing"])]
    assert (weights.size, weights.lfs.size, absent) == (len(WEIGHTS), len(WEIGHTS), [])

    api.create_branch(REPO, branch="other")
    deletions = [CommitOperationDelete("config.json"), CommitOperationDelete("sub/")]
    api.create_commit(REPO, deletions, commit_message="less", revision="other")
    assert set(hub.files(REPO, "main")) - set(hub.files(REPO, "other")) == {"config.json", "sub/empty.bin"}
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "other"}
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=REPO, folder_path=folder, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))
    parent = hub.repositories[REPO].branches["main"][0].oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [CommitOperationAdd("a", b"b")], commit_message="late", parent_commit=parent)

    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)


def test_a_part_of_a_file(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    address = f"{hub.url}/{REPO}/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=1000-1009"})) as answer:
        assert (answer.status, answer.read()) == (206, WEIGHTS[1000:1010])
        assert answer.headers["Content-Range"] == f"bytes 1000-1009/{len(WEIGHTS)}"
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=76790-"})) as answer:
        assert answer.read() == WEIGHTS[76790:]


def test_a_repository_that_exists(hub: HubServer, api: HfApi) -> None:
    made = api.create_repo("model", private=True)
    assert (made.repo_id, hub.repositories[REPO].private) == (REPO, True)
    assert api.create_repo("model", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("model")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/model")


def test_who_may_do_what(hub: HubServer, api: HfApi) -> None:
    api.create_repo("private", private=True)
    api.create_repo("public")
    assert api.whoami()["name"] == "loopback"
    stranger = HfApi(endpoint=hub.url, token=False)
    assert stranger.model_info("loopback/public").id == "loopback/public"
    for missing in ("private", "nothing"):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info(f"loopback/{missing}")
    for token in (False, "hf_wrong"):
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi(endpoint=hub.url, token=token).create_repo("another")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info("loopback/public")
    assert set(hub.repositories) == {"loopback/private", "loopback/public"}


def test_errors_for_some_calls(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    hub.fault("preupload", status=500, calls=2)  # which the client repeats
    hub.fault("commit", status=500, calls=1)  # which it does not, in a single commit
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [request.status for request in hub.requests if request.endpoint == "preupload"] == [500, 500, 200]
    assert hub.titles(REPO) == []
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.titles(REPO)) == 1
    with pytest.raises(ValueError, match="commmit"):
        hub.fault("commmit", status=500)


def test_an_upload_that_is_cut_off(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    hub.fault("lfs_put", drop=True, calls=1)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="after a second try")
    assert [(request.size, request.status) for request in hub.requests if request.endpoint == "lfs_put"] == [
        (len(WEIGHTS) // 2, 0),
        (len(WEIGHTS), 200),
    ]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS

    hub.fault("commit", drop=True)
    (folder / "config.json").write_text('{"changed": true}')
    with pytest.raises(HTTPError):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.titles(REPO) == ["after a second try"]


def test_an_object_with_another_content_is_refused(hub: HubServer) -> None:
    request = urllib.request.Request(f"{hub.url}/lfs/{'0' * 64}", data=b"other", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert hub.objects == {}


def test_a_bad_card_is_refused_before_anything_is_uploaded(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    (folder / "README.md").write_text("---\nbase_model: ./outputs/run\n---\n# a model\n")
    message = '"base_model" with value "./outputs/run" is not valid. Use a model id from https://hf.co/models.'
    with pytest.raises(ValueError, match="Invalid metadata") as caught:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert message in str(caught.value)
    assert endpoints(hub) == ["create", "validate"]

    # Nor is it taken from who did not ask.
    commit = io.BytesIO((folder / "README.md").read_bytes())
    api._validate_yaml = lambda *args, **kwargs: None
    with pytest.raises(HfHubHTTPError, match="base_model"):
        api.create_commit(REPO, [CommitOperationAdd("README.md", commit)], commit_message="card")
    assert hub.titles(REPO) == []


RESULT = "task: {type: text-classification}, dataset: {type: nyu-mll/glue, name: GLUE}"
GOOD_CARDS = [
    "license: apache-2.0",
    "license: [mit, apache-2.0]\nlanguage: [en, zho, multilingual]\nlibrary_name: transformers",
    "base_model: gpt2",
    "base_model: [openai-community/gpt2, nreimers/MiniLM-L6-H384-uncased]",
    "datasets: [nyu-mll/glue]\ntags: [xgrad, 'arxiv:2305.18240']\nmetrics: [accuracy]",
    "model-index: [{name: m, results: []}]",
    f"model-index: [{{name: m, results: [{{{RESULT}, metrics: [{{type: accuracy, value: 0.5}}]}}]}}]",
]
BAD_CARDS = {
    "base_model: /data/models/gpt2": '"base_model" with value "/data/models/gpt2" is not valid',
    "base_model: [gpt2, ../gpt2]": '"base_model[1]" with value "../gpt2" is not valid',
    "base_model: outputs/run/last": '"base_model" with value "outputs/run/last" is not valid',
    "base_model: my model": '"base_model" with value "my model" is not valid',
    "base_model: {name: gpt2}": '"base_model" must be a string',
    "base_model:": '"base_model" must be a string',
    "datasets: [./texts]": '"datasets[0]" with value "./texts" is not valid',
    "license: Apache 2.0": '"license" must be one of [apache-2.0, mit, ',
    "language: EN": '"language" must only contain lowercase characters',
    "language: [english]": '"language[0]" with value "english" is not valid',
    "tags: [1]": '"tags[0]" must be a string',
    "library_name: [transformers]": '"library_name" must be a string',
    "a: [": "Invalid YAML",
    "just text": '"metadata" must be of type object',
    "model-index: {name: m}": '"model-index" must be an array',
    "model-index: [{results: []}]": '"model-index[0].name" is required',
    "model-index: [{name: m}]": '"model-index[0].results" is required',
    f"model-index: [{{name: m, results: [{{{RESULT}}}]}}]": '"model-index[0].results[0].metrics" is required',
    f"model-index: [{{name: m, results: [{{{RESULT}, metrics: {{}}}}]}}]": '.metrics" must be an array',
    f"model-index: [{{name: m, results: [{{{RESULT}, metrics: [{{type: f1}}]}}]}}]": '.metrics[0].value" is required',
    f"model-index: [{{name: m, results: [{{{RESULT}, metrics: [{{type: f1, value: .nan}}]}}]}}]": "must be a number",
    f"model-index: [{{name: m, results: [{{{RESULT}, metrics: [{{type: f1, value: '1'}}]}}]}}]": "must be a number",
    f"model-index: [{{name: m, results: [{{{RESULT}, metrics: [{{value: 1}}]}}]}}]": '.metrics[0].type" is required',
    "model-index: [{name: m, results: [{task: {}, dataset: {type: a, name: a}, metrics: []}]}]": '.task.type" is req',
    "model-index: [{name: m, results: [{task: {type: a}, dataset: {type: a}, metrics: []}]}]": '.dataset.name" is req',
    "model-index: [{name: m, results: [{task: {type: a}, dataset: {type: '', name: a}, metrics: []}]}]": "to be empty",
    "model-index: [{name: m, results: [{task: {type: a}, dataset: {type: a, name: a, config: [c]}, metrics: []}]}]": (
        '"model-index[0].results[0].dataset.config" must be a string'
    ),
}


@pytest.mark.parametrize("metadata", GOOD_CARDS)
def test_good_cards(metadata: str) -> None:
    assert card_problems(f"---\n{metadata}\n---\n# text\n") == ([], [])


@pytest.mark.parametrize("metadata", BAD_CARDS)
def test_bad_cards(metadata: str) -> None:
    errors, warnings = card_problems(f"---\n{metadata}\n---\n# text\n")
    assert len(errors) == 1
    assert BAD_CARDS[metadata] in errors[0]
    assert warnings == []


def test_a_card_without_metadata_is_taken_with_a_warning(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    (folder / "README.md").write_text("# a model\n")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO)["README.md"] == b"# a model\n"


def test_a_card_is_judged_in_plain_text_too(hub: HubServer) -> None:
    """So do `ModelCard.validate()` and `push_to_hub()` of a card ask for it."""
    body = json.dumps({"content": "---\nlicense: none\n---\n", "repoType": "model"}).encode()
    request = urllib.request.Request(f"{hub.url}/api/validate-yaml", data=body, headers={"Accept": "text/plain"})
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)
    assert caught.value.read().startswith(b'"license" must be one of [apache-2.0, mit, ')


def test_an_answer_waits_for_another_call(hub: HubServer, api: HfApi) -> None:
    hub.fault("create", until="whoami")
    with ThreadPoolExecutor() as executor:
        creating = executor.submit(api.create_repo, REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(REPO)
        api.whoami()
        creating.result(timeout=30)
    assert endpoints(hub) == ["info", "whoami", "create"]
    assert api.model_info(REPO).id == REPO


def test_by_hand(tmp_path: Path, folder: Path) -> None:
    script = hub_server.__file__
    command = [sys.executable, script, "--port", "0", "--folder", str(tmp_path / "kept")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            settings = dict(word.split("=") for word in process.stdout.readline().removeprefix("export ").split())
            api = HfApi(endpoint=settings["HF_ENDPOINT"], token=settings["HF_TOKEN"])
            api.create_repo(REPO)
            api.upload_folder(repo_id=REPO, folder_path=folder)
        finally:
            process.send_signal(signal.SIGINT)
        assert "loopback/model: 1 commits" in process.stdout.read()
    assert settings["HF_HUB_DISABLE_XET"] == "1"
    kept = contents(tmp_path / "kept" / REPO / "main")
    assert {path: kept[path] for path in contents(folder)} == contents(folder)
    assert os.listdir(tmp_path / "kept") == ["loopback"]


def test_every_endpoint_is_known() -> None:
    assert [name for name in ENDPOINTS if not hasattr(HubServer, f"_{name}")] == []

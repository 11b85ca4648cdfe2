"""Pushes of a Trainer, and what comes back, over HTTP: true weights at any time, and no failure costs a result."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

import hub_runs
from hub_runs import Clients, Outcome
from hub_server import TOKEN, HubServer
from tiny_models import same

MODES = ["regular", "lfs"]
RULES = ["closed_form", "last_update"]
STEPS = {"save_strategy": "steps", "save_steps": 2}
NUMBERS = (2, 4, 6)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Clients]]:
    pytest.importorskip("peft")
    with HubServer() as server:
        clients = Clients(tmp_path_factory.mktemp("clients"), server.url, TOKEN)
        yield server, clients
        clients.close()


@pytest.fixture
def hub(service: tuple[HubServer, Clients]) -> Iterator[HubServer]:
    server = service[0]
    server.reset()
    yield server
    assert server.errors == []
    branches = [branch for repository in server.repositories.values() for branch in repository.branches.values()]
    assert [
        path
        for branch in branches
        for commit in branch
        for path, file in commit.files.items()
        if TOKEN.encode() in file.content
    ] == []


@pytest.fixture
def client(service: tuple[HubServer, Clients]) -> Clients:
    return service[1]


@pytest.fixture(scope="module")
def unpushed(service: tuple[HubServer, Clients], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights that the same run has where nothing is pushed."""
    folder = tmp_path_factory.mktemp("unpushed")
    return dict(train(service[1], folder, "none", push_to_hub=False, push=False).unwrap()["weights"])


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A repository of its own: the clients share their cache."""
    return f"loopback/{tmp_path.parent.name}-{tmp_path.name}"


def train(client: Clients, folder: Path, name: str, *, xet: bool = False, **settings: Any) -> Outcome:
    hub = {"push_to_hub": True, "hub_model_id": name, "hub_token": TOKEN, "hub_strategy": "end"}
    return client(hub_runs.train, xet=xet, output_dir=str(folder), **hub | STEPS | settings)


def stored(content: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(content)


@pytest.mark.parametrize(
    ("strategy", "mode"),
    [
        ("end", "regular"),
        ("end", "lfs"),
        ("every_save", "lfs"),
        ("checkpoint", "regular"),
        ("checkpoint", "lfs"),
        ("all_checkpoints", "regular"),
    ],
)
def test_what_is_on_the_hub_in_the_end(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, strategy: str, mode: str
) -> None:
    if mode == "regular":
        hub.lfs_names = ()
    folder = tmp_path / "run"
    run = train(client, folder, name, hub_strategy=strategy, xet=mode == "regular").unwrap()

    titles = []
    for number in NUMBERS if strategy != "end" else ():
        titles.append(f"Training in progress, step {number}")
        if strategy != "every_save":
            titles.append(f"Training in progress, step {number}, checkpoint")
    assert hub.titles(name) == [*titles, "End of training"]
    for commit in hub.repositories[name].branches["main"][1:-1]:
        number = int(commit.title.split()[4].rstrip(","))
        assert same(stored(commit.files["model.safetensors"].content), run["steps"][number])
        if commit.title.endswith("checkpoint"):
            place = "last-checkpoint" if strategy == "checkpoint" else f"checkpoint-{number}"
            assert same(stored(commit.files[f"{place}/model.safetensors"].content), run["steps"][number])
    files = hub.files(name)
    assert same(stored(files["model.safetensors"]), run["weights"])
    assert hub.repositories[name].commit("main").files["model.safetensors"].lfs == (mode == "lfs")
    folders = {path.partition("/")[0] for path in files if "/" in path}
    assert (
        folders
        == {
            "end": set(),
            "every_save": set(),
            "checkpoint": {"last-checkpoint"},
            "all_checkpoints": {f"checkpoint-{number}" for number in NUMBERS},
        }[strategy]
    )
    assert {"README.md", "config.json", "training_curves.png"} <= files.keys()
    assert files["README.md"] == (folder / "README.md").read_bytes()
    assert b"xgrad" in files["README.md"]
    assert [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_a_pushed_model_loads_back(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, lora: bool, mode: str
) -> None:
    if mode == "regular":
        hub.lfs_names = ()
    trained = train(client, tmp_path / "run", name, lora=lora, hub_private_repo=True).unwrap()["weights"]
    loaded = client(hub_runs.load, token=TOKEN, name=name, lora=lora).unwrap()
    assert same(loaded, trained)
    assert "resolve" in {request.endpoint for request in hub.requests}
    # Only who has the token gets at it.
    assert hub.repositories[name].private
    assert client(hub_runs.load, name=name + "-", lora=lora).error is not None


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_from_the_hub_is_gone_on_from(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, rule: str
) -> None:
    settings = {
        "xgrad_rule": rule,
        "xgrad_steps": 1.0,
        "lr_scheduler_type": "constant",
        "hub_strategy": "checkpoint",
        "max_steps": 4,
    }
    train(client, tmp_path / "first", name, push=False, **settings).unwrap()
    assert ("last-checkpoint/xgrad.safetensors" in hub.files(name)) == (rule == "last_update")
    longer = settings | {"max_steps": 7, "push_to_hub": False}
    whole = train(client, tmp_path / "whole", name, push=False, **longer).unwrap()
    resumed = train(client, tmp_path / "second", name, push=False, resume_from=name, **longer).unwrap()
    # The cache keeps files as links out of the folder.
    assert resumed["links"]
    assert sorted(resumed["steps"]) == [5, 6, 7]
    assert same(resumed["weights"], whole["weights"])
    assert all(same(resumed["steps"][step], whole["steps"][step]) for step in resumed["steps"])


@pytest.mark.parametrize("rule", RULES)
def test_what_is_pushed_while_training_goes_on_are_true_weights(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, rule: str
) -> None:
    hub.fault("preupload", until="whoami", calls=1)
    run = train(
        client,
        tmp_path / "run",
        name,
        xgrad_rule=rule,
        xgrad_steps=1.0,
        hub_strategy="every_save",
        waits=False,
        lookup=5,
        push=False,
    ).unwrap()
    # That push was under way when the model held predicted weights, and the one of step 4 was left out for it.
    assert set(run["moved"]) >= {2, 3}
    commits = hub.repositories[name].branches["main"][1:]
    assert commits[0].title == "Training in progress, step 2"
    assert "Training in progress, step 4" not in hub.titles(name)
    for commit in commits:
        assert same(stored(commit.files["model.safetensors"].content), run["steps"][int(commit.title.split()[-1])])


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_only_a_base_model_of_the_hub_is_named(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, lora: bool
) -> None:
    folder, tuned = tmp_path / "base", f"{name}-tuned"
    train(client, folder, name).unwrap()
    for base in (str(folder), name):
        outcome = train(client, tmp_path / "run", tuned, base=base, lora=lora, max_steps=2)
        outcome.unwrap()
        card = hub.files(tuned)["README.md"].decode()
        assert str(folder) not in card
        assert (f"base_model: {name}" in card) == (base == name)
        # Told before there is anything to lose.
        told = f"the model was loaded from {folder}, which is no id of the Hub"
        assert (told in outcome.log.partition("train_runtime")[0]) == (base != name)
    assert len(hub.titles(tuned)) == 2


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_each_push_of_an_adapter_to_a_local_model_arrives(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, strategy: str
) -> None:
    """Into every folder that it saves peft writes a card which names the base model, wherever that is."""
    base, folder = tmp_path / "base", tmp_path / "run"
    train(client, base, f"{name}-base").unwrap()
    settings = {"base": str(base), "lora": True, "hub_strategy": strategy}
    # The second run pushes the card that the first has left, too.
    for _ in range(2):
        outcome = train(client, folder, name, **settings)
        outcome.unwrap()
        assert "a push of a checkpoint failed" not in outcome.log
    titles = [f"Training in progress, step {number}" for number in NUMBERS]
    if strategy != "every_save":
        titles = [title + end for title in titles for end in ("", ", checkpoint")]
    assert [title for title in hub.titles(name) if title != "End of training"][: len(titles)] == titles
    cards = [content.decode() for path, content in hub.files(name).items() if path.endswith("README.md")]
    assert len(cards) == {"every_save": 1, "checkpoint": 2, "all_checkpoints": 1 + len(NUMBERS)}[strategy]
    assert not any(str(base) in card for card in cards)


def test_a_repository_that_is_there_is_fine(hub: HubServer, client: Clients, tmp_path: Path, name: str) -> None:
    train(client, tmp_path / "first", name).unwrap()
    first = hub.files(name)
    second = train(client, tmp_path / "second", name, max_steps=4).unwrap()
    assert hub.titles(name) == ["End of training", "End of training"]
    assert same(stored(hub.files(name)["model.safetensors"]), second["weights"])
    assert hub.files(name)["model.safetensors"] != first["model.safetensors"]


@pytest.mark.parametrize("status", [401, 403, 500])
def test_no_repository_no_training(hub: HubServer, client: Clients, tmp_path: Path, name: str, status: int) -> None:
    hub.fault("create", status=status)
    outcome = train(client, tmp_path / "run", name)
    assert outcome.error == "HfHubHTTPError"
    assert str(status) in outcome.text
    assert "loss" not in outcome.log
    assert not list((tmp_path / "run").glob("*"))


FAULTS: dict[str, Any] = {
    "upload": ("lfs_put", {"status": 500}),
    "upload_cut_off": ("lfs_put", {"drop": True}),
    "commit": ("commit", {"status": 500}),
    "commit_cut_off": ("commit", {"drop": True}),
    "token": ("preupload", {"status": 401}),
    "rights": ("commit", {"status": 403}),
}
# A client that has hf_xet goes other ways, of which this server knows those of files that are not LFS files.
CASES = [*((kind, False) for kind in FAULTS), ("commit", True), ("commit_cut_off", True), ("token", True)]


def push_again(client: Clients, outcome: Outcome) -> dict[str, Any]:
    """Run the command that the error names, as whoever is logged in."""
    (note,) = outcome.notes
    words = shlex.split(note[note.index("hf-xgrad push") :])
    assert words[:2] == ["hf-xgrad", "push"]
    return client(hub_runs.command, token=TOKEN, words=words[1:]).unwrap()


@pytest.mark.parametrize(("kind", "xet"), CASES, ids=[kind + "_xet" * xet for kind, xet in CASES])
def test_a_push_that_fails_costs_nothing(
    hub: HubServer, client: Clients, unpushed: dict[str, Tensor], tmp_path: Path, name: str, kind: str, xet: bool
) -> None:
    endpoint, fault = FAULTS[kind]
    if xet:
        hub.lfs_names = ()
    folder = tmp_path / "run"
    hub.fault(endpoint, **fault)
    outcome = train(client, folder, name, xet=xet)
    assert outcome.error is not None
    assert hub.titles(name) == []

    # All of it is there.
    assert same(client(hub_runs.load, name=str(folder)).unwrap(), unpushed)
    assert (folder / "README.md").is_file()
    assert (folder / "trainer_state.json").is_file()

    hub.faults.clear()
    assert push_again(client, outcome)["status"] == 0
    assert same(stored(hub.files(name)["model.safetensors"]), unpushed)
    assert hub.files(name)["README.md"] == (folder / "README.md").read_bytes()
    assert same(client(hub_runs.load, name=name).unwrap(), unpushed)


def test_a_hub_without_xet(hub: HubServer, client: Clients, tmp_path: Path, name: str) -> None:
    """hf_xet asks for its own storage; what it raises is of another kind than errors over HTTP."""
    pytest.importorskip("hf_xet")
    outcome = train(client, tmp_path / "run", name, xet=True)
    assert outcome.error is not None
    assert any("/xet-write-token/" in request.path for request in hub.requests)
    assert push_again(client, outcome)["status"] == 0
    assert hub.titles(name) == ["End of training"]


def test_a_push_again_that_fails_again_says_so(hub: HubServer, client: Clients, tmp_path: Path, name: str) -> None:
    hub.fault("commit", status=500)
    outcome = train(client, tmp_path / "run", name)
    again = push_again(client, outcome)
    assert again["status"] == 2
    assert again["errors"].splitlines()[-1].startswith("hf-xgrad: error: ")
    assert "500" in again["errors"].splitlines()[-1]
    assert "Traceback" not in again["errors"]


def test_pushing_by_hand(hub: HubServer, client: Clients, tmp_path: Path, name: str) -> None:
    def push(*words: str, token: str | None = TOKEN) -> dict[str, Any]:
        return dict(client(hub_runs.command, token=token, words=["push", *words]).unwrap())

    folder, other = tmp_path / "run", f"{name}-other"
    hub.fault("commit", status=500)
    train(client, folder, name)
    hub.faults.clear()

    assert push(str(folder), "--hub_model_id", other, "--private")["status"] == 0
    assert (hub.repositories[name].private, hub.repositories[other].private) == (False, True)
    assert hub.files(other)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not any(path.startswith("checkpoint-") for path in hub.files(other))

    (folder / "results.json").write_text("{}")
    branches = hub.repositories[other].branches
    branches["second"] = list(branches["main"])
    assert push(str(folder), "--hub_model_id", other, "--revision", "second")["status"] == 0
    assert set(hub.files(other, "second")) - set(hub.files(other)) == {"results.json"}

    hub.requests.clear()
    for words, token in (
        ([str(tmp_path / "nothing")], TOKEN),
        ([str(folder), "--hub_model_id", other, "--revision", "third"], TOKEN),
        ([str(folder), "--hub_model_id", other], None),
    ):
        refused = push(*words, token=token)
        assert refused["status"] == 2
        assert refused["errors"].splitlines()[-1].startswith("hf-xgrad: error: ")
    assert "commit" not in {request.endpoint for request in hub.requests}


def test_a_rejected_card_costs_nothing(hub: HubServer, client: Clients, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    outcome = train(client, folder, name, card={"language": "english"})
    assert outcome.error == "ValueError"
    assert '"language[0]" with value "english" is not valid' in outcome.text
    assert hub.titles(name) == []
    assert {"preupload", "lfs_put", "commit"}.isdisjoint(request.endpoint for request in hub.requests)
    weights = client(hub_runs.load, name=str(folder)).unwrap()

    assert push_again(client, outcome)["status"] == 2
    card = folder / "README.md"
    text = card.read_text()
    assert text.count("english") == 1
    card.write_text(text.replace("english", "en"))
    assert push_again(client, outcome)["status"] == 0
    assert same(client(hub_runs.load, name=name).unwrap(), weights)


@pytest.mark.parametrize("fault", [{"status": 403}, {"drop": True}], ids=["refused", "cut_off"])
@pytest.mark.parametrize("failing", [2, 6])
def test_a_push_in_the_background_that_fails_is_one_warning(
    hub: HubServer, client: Clients, tmp_path: Path, name: str, failing: int, fault: dict[str, Any]
) -> None:
    hub.fault("commit", calls=NUMBERS.index(failing))
    hub.fault("commit", calls=1, **fault)
    run = train(client, tmp_path / "run", name, hub_strategy="every_save")
    assert run.log.count("a push of a checkpoint failed") == 1
    pushed = [f"Training in progress, step {number}" for number in NUMBERS if number != failing]
    assert hub.titles(name) == [*pushed, "End of training"]
    assert same(stored(hub.files(name)["model.safetensors"]), run.unwrap()["weights"])


@pytest.mark.parametrize("host", ["192.0.2.1", "huggingface.co"])
def test_no_client_leaves_this_machine(service: tuple[HubServer, Clients], host: str) -> None:
    with pytest.raises(AssertionError, match=host):
        service[1](hub_runs.reach_out, host=host)

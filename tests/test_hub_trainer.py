"""HPMKDTrainer publishes as Trainer does: the same files, the student alone, by call and by `push_to_hub=True`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

# Publishes one training of each trainer, through push_to_hub() and through hub_strategy="end", and says what it has.
SCRIPT = """if True:
    import json, sys
    from pathlib import Path
    import tiny
    from transformers import AutoModelForImageClassification, Trainer
    from hf_hpmkd.trainer import HPMKDTrainer

    folder = Path(sys.argv[1])
    common = {"train_dataset": tiny.TinyImages(32), "eval_dataset": tiny.TinyImages(16, seed=5)}

    def settings(name, **more):
        more = {"num_train_epochs": 1, "hub_model_id": f"tester/{name}", "hub_private_repo": True, **more}
        return tiny.arguments(folder / name, **more)

    teachers = tiny.tiny_teachers(2)

    def ours(name, **more):
        return HPMKDTrainer(tiny.tiny_vit(), list(teachers), settings(name, **more),
                            guide_dataset=tiny.TinyImages(16, seed=3), **common)

    plain = Trainer(tiny.tiny_vit(), settings("plain"), **common)
    plain.train()
    plain.push_to_hub()

    called = ours("called")
    called.train()
    called.push_to_hub()

    # Saves at each epoch but pushes only at the end, which for Trainer is the call of save_model.
    ended = ours("ended", push_to_hub=True, hub_strategy="end", save_strategy="epoch")
    ended.train()
    ended.save_model()

    # Pushes each checkpoint in the background as it is saved.
    every = ours("every", push_to_hub=True, hub_strategy="every_save", hub_always_push=True, save_strategy="epoch",
                 num_train_epochs=2)
    every.train()

    found = {}
    for name, trainer in [("plain", plain), ("called", called), ("ended", ended), ("every", every)]:
        again = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
        found[name] = bool((tiny.weights_of(again) == tiny.weights_of(trainer.model)).all())
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(folder / "home"), "HPMKD_CACHE": str(folder / "cache")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.getenv("PYTHONPATH")]))
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        yield hub, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["plain", "called", "ended", "every"])
def test_what_was_trained_is_what_the_hub_gives(published, name):
    hub, equal = published
    assert equal[name]
    assert hub.repos["models", f"tester/{name}"].private


@pytest.mark.parametrize("name", ["called", "ended", "every"])
def test_the_same_files_as_trainer_and_nothing_of_the_teachers(published, name):
    hub, _ = published
    ours, plain = hub.files(f"tester/{name}"), hub.files("tester/plain")
    missing = {"README.md"} if name == "every" else set()  # Trainer writes the card in push_to_hub alone
    assert set(ours) == set(plain) - missing
    assert len(ours["model.safetensors"]) == len(plain["model.safetensors"])


@pytest.mark.parametrize("name", ["called", "ended"])
def test_one_commit_with_the_student(published, name):
    hub, _ = published
    changed = [commit.changed for commit in hub.repos["models", f"tester/{name}"].commits]
    assert sum("model.safetensors" in paths for paths in changed) == 1


def test_every_save_pushes_each_checkpoint(published):
    hub, _ = published
    titles = [commit.title for commit in hub.repos["models", "tester/every"].commits]
    assert [title for title in titles if title.startswith("Training in progress")] == [
        "Training in progress, epoch 1", "Training in progress, epoch 2"
    ]  # fmt: skip


def test_the_card_names_the_trainer(published):
    hub, _ = published
    card = hub.files("tester/called")["README.md"].decode()
    assert card.startswith("---\n") and "generated_from_trainer" in card

"""docs/hub.md runs as it is written, against a Hub on loopback: in order, and where it says so without the package."""

import re
import textwrap
from pathlib import Path

from hub_server import HubServer
from interpreters import run_python
from test_readme import SHAPE, blocks


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "hub.md").read_text()
PUBLISH = """
    import torch
    from modeling_mapex import MapexConfig, MapexForPreTraining

    config = MapexConfig.from_preset("nano", ["s1", "s2", "rgb", "dem"])
    model = MapexForPreTraining(config)
    pixels = {name: torch.randn(2, len(spec["bands"]), 32, 32) for name, spec in config.modalities.items()}
    model.calibrate_experts([{"pixel_values": {name: value}} for name, value in pixels.items()])
    model.save_pretrained("base", shard_by_modality=True)
"""


def with_checks(snippet: str) -> str:
    """A snippet, with shapes that it states compared."""
    return SHAPE.sub(lambda found: f"assert tuple({found['expression']}) == {found['shape']}", snippet)


def test_snippets_run(tmp_path):
    snippets = blocks(TEXT)
    remote = [snippet for snippet in snippets if "trust_remote_code" in snippet]
    assert len(remote) == 1 and len(snippets) >= 9
    assert SHAPE.search(remote[0])
    run_python(PUBLISH, tmp_path)
    with HubServer(tmp_path / "hub") as hub:
        hub.put_folder("org/mapex-base", tmp_path / "base")
        here = [with_checks(snippet) for snippet in snippets if snippet not in remote]
        checks = """
            assert flood.num_labels == 2 and list(flood.config.modalities) == ["s1"]
            assert flood.config.pruning["source"] == "org/mapex-base"
            assert optical.config.modalities["s2"]["bands"] == ["B04", "B03", "B02"]
            assert all(torch.equal(merged.state_dict()[key], value) for key, value in model.state_dict().items())
        """
        environment = hub.environment(tmp_path / "home")
        run_python("\n".join([*here, textwrap.dedent(checks)]), tmp_path, environment)
        run_python(with_checks(remote[0]), tmp_path, hub.environment(tmp_path / "home-2"), package=False)
        assert hub.repository("me/mapex-base-s1-flood").private
        assert "Frozen lakes" in [commit.title for commit in hub.repository("me/mapex-base-s1-flood").commits.values()]
        files = set(hub.files("me/mapex-mine"))
        for name in re.findall(r"^\| `(model[\w.-]+)` \|", TEXT, flags=re.MULTILINE):
            if name not in ("model-experts-s1-s2.safetensors", "model-unused-experts.safetensors"):  # as routing has it
                assert name in files, name
        card = hub.read("me/flood-2", "README.md").decode()
        assert "floods" in card and "| loss |" in card
        assert '"bands": [\n        "VV"\n      ]' in hub.read("me/flood-vv", "config.json").decode()


def test_errors_are_those_of_the_code():
    code = "".join(file.read_text() for file in (ROOT / "modeling_mapex").glob("*.py"))
    own = re.sub(r'"\s*f?"', "", code)  # texts that go over lines
    messages = re.findall(r"^\| `([^`|]+)` \|", TEXT.split("## When something is wrong")[1], flags=re.MULTILINE)
    assert len(messages) == 7
    for message in messages:
        words = re.split(r"\.\.\.|\[.*?\]|pytorch_model\.bin", message)
        if "model identifier" not in message:  # that one is transformers'
            assert all(part.strip() in own for part in words), message

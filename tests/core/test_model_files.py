"""Which model a name stands for."""

import pytest

from cogumi.core.errors import ArtifactError
from cogumi.core.model_files import is_short_name, locate_model


def test_build_folder_does_not_hide_the_model_of_the_same_name(tmp_path):
    """`make demo` builds in `runs/smollm2`, where the relative paths of an adopted recipe start, too."""
    build = tmp_path / "smollm2"
    assert is_short_name("smollm2", tmp_path)
    build.mkdir()
    assert is_short_name("smollm2", tmp_path)
    (build / "config.json").write_text("{}")
    assert not is_short_name("smollm2", tmp_path)
    assert locate_model("smollm2", tmp_path) == build
    assert not is_short_name("other", tmp_path)


def test_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match=r"other has no config\.json"):
        locate_model("other", tmp_path)
    (tmp_path / "other" / "a.gguf").touch()
    with pytest.raises(ArtifactError, match=r"name one of them, such as .*a\.gguf"):
        locate_model("other", tmp_path)
    with pytest.raises(ArtifactError, match="there is no model 'nothing'"):
        locate_model("nothing", tmp_path)

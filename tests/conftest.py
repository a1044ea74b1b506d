"What the tests share: tiny models, made once a session."

import os, pytest, tiny

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    return tiny.open_clip_folder(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory):
    return tiny.siglip_folder(tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture(scope="session")
def tiny_hf_clip(tmp_path_factory):
    return tiny.hf_clip_folder(tmp_path_factory.mktemp("models") / "hf_clip")


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory):
    return tiny.generator_folder(tmp_path_factory.mktemp("models") / "generator")

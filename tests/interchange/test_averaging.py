"""Averages of checkpoints in every format against NumPy, what is refused, and greedy soups."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from in_memory import CONFIG, ArraySource, random_source, values_of

from llama_jax.config.loading import ConfigError
from llama_jax.interchange import averaging
from llama_jax.interchange.averaging import average
from llama_jax.interchange.averaging_checks import tokenizer_difference
from llama_jax.interchange.averaging_greedy import Trial, greedy_soup
from llama_jax.interchange.averaging_source import AveragedSource
from llama_jax.interchange.conversion_options import Options
from llama_jax.interchange.gguf_writing import write_gguf
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.orbax import write_orbax
from llama_jax.interchange.source import InterchangeError
from llama_jax.interchange.tensors import BFLOAT16
from llama_jax.tokenizers.byte import ByteTokenizer

BYTE = ByteTokenizer()
BARE = Options(tokenizer=False)


def write(folder, seed, *, config=CONFIG, dtype=np.float32):
    write_hugging_face(random_source(config, dtype, seed), folder, tokenizer=BYTE)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("averaged")
    return [write(root / str(seed), seed) for seed in range(3)]


def mean_of(seeds, weights):
    """In float64, by NumPy alone."""
    sources = [values_of(random_source(seed=seed)) for seed in seeds]
    total = sum(weights)
    return {
        name: sum(
            w / total * s[name].astype(np.float64) for w, s in zip(weights, sources, strict=True)
        )
        for name in sources[0]
    }


def assert_close(source, wanted, rtol=1e-6):
    found = values_of(source)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=1e-7, err_msg=name)


def test_a_uniform_average_is_the_mean_of_each_tensor(folders, tmp_path):
    report = average(folders, tmp_path / "out")
    written = open_source(tmp_path / "out")
    assert (written.format, report.dtype) == ("hf", "float32")
    assert_close(written, mean_of([0, 1, 2], [1, 1, 1]))
    assert written.load_tokenizer().fingerprint == BYTE.fingerprint
    told = json.loads((tmp_path / "out" / "averaged.json").read_text())
    assert [(each["path"], each["weight"]) for each in told["ingredients"]] == [
        (str(folder), pytest.approx(1 / 3)) for folder in folders
    ]


def test_weights_count_by_their_shares(folders, tmp_path):
    average(folders, tmp_path / "out", weights=[3, 0, 1])
    assert_close(open_source(tmp_path / "out"), mean_of([0, 2], [3, 1]))


def test_one_checkpoint_twice_is_itself(folders, tmp_path):
    average([folders[0], folders[0]], tmp_path / "out")
    assert_close(open_source(tmp_path / "out"), mean_of([0], [1]), rtol=0)


def test_formats_mix_and_any_can_be_written(folders, tmp_path):
    write_orbax(random_source(seed=1), tmp_path / "orbax", tokenizer=BYTE)
    write_gguf(random_source(seed=2), tmp_path / "2.gguf")
    paths = [folders[0], tmp_path / "orbax", tmp_path / "2.gguf"]
    wanted = mean_of([0, 1, 2], [1, 1, 1])
    average(paths, tmp_path / "out", to="orbax", options=BARE)
    assert_close(open_source(tmp_path / "out"), wanted)
    average(paths[:2], tmp_path / "out.gguf", to="gguf")
    assert_close(open_source(tmp_path / "out.gguf"), mean_of([0, 1], [1, 1]))


def test_bfloat16_is_summed_in_float32_and_written_as_the_first_was(folders, tmp_path):
    paths = [write(tmp_path / str(seed), seed, dtype=BFLOAT16) for seed in range(4)]
    report = average(paths, tmp_path / "out")
    assert report.dtype == "bfloat16"
    stored = [values_of(open_source(path)) for path in paths]
    for name, values in values_of(open_source(tmp_path / "out")).items():
        exact = np.mean([each[name].astype(np.float32) for each in stored], axis=0)
        assert values.dtype == BFLOAT16
        # Rounded once: half a unit in bfloat16's last place, and float32's own rounding.
        np.testing.assert_allclose(values.astype(np.float32), exact, rtol=2**-8, atol=1e-6)
    report = average(paths, tmp_path / "wide", options=Options(dtype="float32"))
    assert report.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mlp_dim": 64}, "mlp_dim is 64, not 96 as that of .*: another architecture"),
        ({"num_layers": 1}, "num_layers is 1, not 2 as that"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, not 1e-05 as that"),
        ({"max_seq_len": 32}, "max_seq_len is 32, not 64 as that"),
    ],
)
def test_another_architecture_is_refused_by_the_field_that_differs(
    folders, tmp_path, changes, complaint
):
    other = write(tmp_path / "other", 1, config=dataclasses.replace(CONFIG, **changes))
    with pytest.raises(InterchangeError, match=complaint):
        average([folders[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_a_model_was_initialised_is_of_no_account():
    other = dataclasses.replace(CONFIG, init_std=0.5)
    sources = [random_source(), random_source(other, seed=1)]
    averaging.check_alike(sources)


class Other(ByteTokenizer):
    """A byte tokenizer that differs in one thing."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    @property
    def fingerprint(self):
        return "other"

    @property
    def vocab_size(self):
        return self.changes.get("vocab_size", super().vocab_size)

    @property
    def special(self):
        return self.changes.get("special", super().special)

    def decode(self, ids, **options):
        text = super().decode(ids, **options)
        return self.changes.get("texts", {}).get(text, text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vocab_size": 280}, "280 ids, not 272"),
        ({"special": {}}, r"<\|begin_of_text\|> is no token, not id 256"),
        ({"texts": {"A": "B"}}, "id 65 is 'B', not 'A'"),
        ({}, "the same ids by other rules"),
    ],
)
def test_another_tokenizer_is_refused_by_what_differs(changes, complaint):
    sources = [random_source(), random_source(seed=1, tokenizer=Other(**changes))]
    with pytest.raises(InterchangeError, match=complaint):
        averaging.check_alike(sources)
    assert averaging.check_alike(sources, tokenizers=False) is None
    assert tokenizer_difference(BYTE, ByteTokenizer()) is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weights": [1]}, "--weights: 1 weights for 3 checkpoints"),
        ({"weights": [1, -1, 1]}, "--weights: -1 is not a weight; at least 0"),
        ({"weights": [1, float("nan"), 1]}, "--weights: nan is not a weight"),
        ({"weights": [0, 0, 0]}, "--weights: all are 0"),
        ({"weights": [1, 1, 1], "held_out_loss": len}, "a greedy soup's weights are its own"),
        ({"to": "hff"}, "unknown format 'hff'"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(folders, tmp_path, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        average(folders, tmp_path / "out", **options)


def test_one_checkpoint_is_no_average_and_what_is_there_stays(folders, tmp_path):
    with pytest.raises(ConfigError, match="of at least two checkpoints"):
        average(folders[:1], tmp_path / "out")
    with pytest.raises(ConfigError, match="is there already"):
        average(folders, folders[0])


def test_a_nan_in_any_of_them_is_told(folders, tmp_path):
    source = random_source(seed=1)
    source.arrays["layers.1.mlp.up_proj"][3, 3] = np.nan
    write_hugging_face(source, tmp_path / "nan", tokenizer=BYTE)
    with pytest.raises(InterchangeError, match=r"up_proj.* holds a NaN"):
        average([folders[0], tmp_path / "nan"], tmp_path / "out")


def test_progress_ends_with_all_bytes_of_all_of_them(folders, tmp_path):
    told = []
    average(folders, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    done, total = told[-1]
    average(folders, tmp_path / "two", weights=[1, 0, 1], progress=lambda *now: told.append(now))
    assert told[-1] == (total * 2 / 3, total * 2 / 3)
    assert done == total == 3 * 4 * sum(x.size for x in random_source().arrays.values())


def test_no_more_than_a_piece_of_each_is_held(folders):
    sources = [ArraySource(CONFIG, random_source(seed=seed).arrays) for seed in range(3)]
    mean = AveragedSource(sources)
    tensor = mean.tensors["embedding"]
    tracemalloc.start()
    tensor.read((slice(0, 16), slice(0, 64)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 16 * 64 * 4


def constant(value):
    """A checkpoint whose every parameter is `value`."""
    arrays = {name: np.full_like(x, value) for name, x in random_source().arrays.items()}
    return ArraySource(CONFIG, arrays)


def far_from(target):
    """A loss of constants: how far their value is from `target`."""
    return lambda source: abs(float(source.tensors["final_norm.scale"].read_all()[0]) - target)


def test_a_greedy_soup_takes_what_does_not_raise_the_loss():
    sources, said = [constant(value) for value in (0.0, 5.0, 2.0, -9.0)], []
    # 2 first; with 0 the mean is 1, as far off; then with 5 it is 7/3, with -9 -7/3: left out.
    assert greedy_soup(sources, far_from(1.5), said.append) == [
        Trial(loss=1.5, place=2, kept=True, soup_loss=0.5),
        Trial(loss=3.5, place=3, kept=False, soup_loss=pytest.approx(7 / 3 - 1.5)),
        Trial(loss=0.5, place=1, kept=True, soup_loss=0.5),
        Trial(loss=10.5, place=4, kept=False, soup_loss=pytest.approx(7 / 3 + 1.5)),
    ]
    assert said[4:] == [
        "with arrays the mean's is 0.5000: kept",
        "with arrays the mean's is 0.8333: left out",
        "with arrays the mean's is 3.8333: left out",
    ]
    alone = greedy_soup(sources, far_from(5.0))
    assert [trial.kept for trial in alone] == [False, True, False, False]
    with pytest.raises(ConfigError, match="arrays: its held-out loss is nan"):
        greedy_soup(sources, lambda source: float("nan"))


def test_a_later_ingredient_may_be_kept_after_one_that_was_not():
    # Of 5: 4 is 1 off; with 3.5 the mean is further, 3.75; with 7, without 3.5, it is 5.5.
    soup = greedy_soup([constant(value) for value in (4.0, 3.5, 7.0)], far_from(5.0))
    assert [(trial.kept, trial.soup_loss) for trial in soup] == [
        (True, 1.0),
        (False, 1.25),
        (True, 0.5),
    ]


def test_equal_ingredients_are_tried_as_they_were_given():
    soup = greedy_soup([constant(value) for value in (1.0, 3.0, 1.0)], far_from(2.0))
    assert [(trial.place, trial.soup_loss) for trial in soup] == [
        (1, 1.0),
        (2, 0.0),
        (3, pytest.approx(1 / 3)),
    ]


def test_a_greedy_soup_is_written_with_its_losses(folders, tmp_path):
    def loss(source):
        return abs(float(source.tensors["final_norm.scale"].read_all().mean()) - 1.0)

    report = average(folders, tmp_path / "out", held_out_loss=loss)
    trials = [each.trial for each in report.ingredients]
    kept = [seed for seed, trial in enumerate(trials) if trial.kept]
    assert_close(open_source(tmp_path / "out"), mean_of(kept, [1] * len(kept)))
    assert [each.weight for each in report.ingredients] == [
        pytest.approx(trial.kept / len(kept)) for trial in trials
    ]
    assert report.loss == pytest.approx(loss(open_source(tmp_path / "out")), abs=1e-6)
    told = json.loads((tmp_path / "out" / "averaged.json").read_text())
    assert told["loss"] == report.loss <= min(trial.loss for trial in trials)
    assert told["ingredients"][1] == {
        "path": str(folders[1]),
        "weight": report.ingredients[1].weight,
        **dataclasses.asdict(trials[1]),
    }

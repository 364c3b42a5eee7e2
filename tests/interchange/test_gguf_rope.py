import numpy as np
import pytest

from llama_jax.config.model import Llama3Scaling, RopeConfig
from llama_jax.interchange.gguf_rope import divisors, scaling_of
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.models.rope import frequencies

RELEASES = {
    "3.1": (Llama3Scaling(8.0, 8192), 128),
    "3.2 1B": (Llama3Scaling(32.0, 8192), 64),
    "3.2 3B": (Llama3Scaling(32.0, 8192), 128),
}


def as_other_writers_compute(scaling, theta, head_dim):
    """float32 throughout, pair by pair, as a converter in torch would."""
    f32 = np.float32
    out = []
    for i in range(0, head_dim, 2):
        f = f32(1) / f32(theta) ** (f32(i) / f32(head_dim))
        wavelength = f32(2 * np.pi) / f
        turns = f32(scaling.original_max_seq_len) / wavelength
        t = (turns - f32(scaling.low_freq_factor)) / f32(
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        if turns > scaling.high_freq_factor:
            out.append(1.0)
        elif turns < scaling.low_freq_factor:
            out.append(scaling.factor)
        else:
            out.append(f32(1) / ((f32(1) - t) / f32(scaling.factor) + t))
    return np.array(out, np.float32)


def test_known_shares_of_llama_3_1():
    shares = 1 / divisors(Llama3Scaling(8.0, 8192), 500000.0, 128)
    assert (shares[:29] == 1).all()
    np.testing.assert_allclose(
        shares[29:35],
        [0.8281684, 0.6437431, 0.4935071, 0.3711223, 0.2714255, 0.1902107],
        atol=1e-6,
    )
    assert (shares[35:] == 0.125).all()


@pytest.mark.parametrize("release", RELEASES)
def test_frequencies_over_divisors_are_the_networks_own(release):
    scaling, head_dim = RELEASES[release]
    plain_R = frequencies(RopeConfig(500000.0), head_dim)
    scaled_R = frequencies(RopeConfig(500000.0, scaling), head_dim)
    np.testing.assert_allclose(plain_R / divisors(scaling, 500000.0, head_dim), scaled_R, rtol=3e-7)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.short
def test_released_settings_are_recovered_exactly_from_others_float32(release):
    scaling, head_dim = RELEASES[release]
    assert scaling_of(divisors(scaling, 500000.0, head_dim), 500000.0, head_dim) == scaling
    theirs_R = as_other_writers_compute(scaling, 500000.0, head_dim)
    assert scaling_of(theirs_R, 500000.0, head_dim) == scaling


def test_any_settings_are_recovered_to_the_same_frequencies():
    random = np.random.default_rng(0)
    for _ in range(300):
        theta, head_dim = random.choice([1e4, 1e5, 5e5]), int(random.choice([16, 64, 128]))
        low = float(random.choice([1, 1, 1.5, 2]))
        scaling = Llama3Scaling(
            float(random.choice([2, 4, 5.5, 8, 16, 32])),
            int(random.choice([64, 1000, 2048, 4096, 8192])),
            low_freq_factor=low,
            high_freq_factor=low * float(random.choice([1, 2, 3, 4, 8])),
        )
        given_R = divisors(scaling, theta, head_dim)
        found = scaling_of(given_R, theta, head_dim)
        if found is None:
            assert (given_R == 1).all()
            continue
        np.testing.assert_allclose(divisors(found, theta, head_dim), given_R, rtol=2e-5)


def test_common_settings_with_two_pairs_in_the_band_come_back_as_they_were():
    for scaling in (Llama3Scaling(4.0, 2048), Llama3Scaling(16.0, 8192, high_freq_factor=8.0)):
        assert scaling_of(divisors(scaling, 500000.0, 128), 500000.0, 128) == scaling


def test_divisors_of_one_are_no_scaling():
    assert scaling_of(np.ones(32, np.float32), 10000.0, 64) is None


@pytest.mark.parametrize("at", [0, 31, 40, 63])
def test_divisors_that_no_setting_gives_are_refused(at):
    given_R = divisors(Llama3Scaling(8.0, 8192), 500000.0, 128)
    given_R[at] *= 1.001
    with pytest.raises(InterchangeError, match="no llama3 scaling gives these divisors"):
        scaling_of(given_R, 500000.0, 128)


def test_divisors_that_contradict_what_the_file_states_are_refused():
    given_R = divisors(Llama3Scaling(8.0, 8192), 500000.0, 128)
    stated = Llama3Scaling(32.0, 8192)
    with pytest.raises(InterchangeError, match=r"factor=32.0.* doesn't give these divisors"):
        scaling_of(given_R, 500000.0, 128, stated)


@pytest.mark.parametrize(
    ("given_R", "message"),
    [
        (np.ones(8), "8.* for 32 rotary pairs"),
        (np.full(32, np.nan), "positive numbers"),
        (np.zeros(32), "positive numbers"),
    ],
)
def test_tensors_that_are_no_divisors_are_refused(given_R, message):
    with pytest.raises(InterchangeError, match=message):
        scaling_of(given_R.astype(np.float32), 10000.0, 64)

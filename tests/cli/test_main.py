"""The command line's frame: verbs, help, errors in one line, exit codes."""

import pytest

from llama_jax.cli.main import VERBS, main


def test_an_unknown_verb_exits_2_and_suggests_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "llama-jax: error: unknown verb 'trian' (did you mean 'train'?)\n"
    )


def test_a_bad_config_exits_2_with_one_line(capsys):
    assert main(["train", "quickstrat"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean 'quickstart'" in error


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as exited:
        main([verb, "--help"])
    assert exited.value.code == 0
    assert f"llama-jax {verb} " in capsys.readouterr().out.partition("\n\n")[2]


def test_help_lists_the_verbs(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(verb in output for verb in VERBS)
    assert main([]) == 2

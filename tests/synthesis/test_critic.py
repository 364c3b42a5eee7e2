"""Poor answers corrected by a model that says what is written here, and by a person's file."""

import dataclasses
import functools
import json

import pytest
from small_sessions import scripted_session
from stored_samples import Stored, lines, write_samples

from llama_jax.config.loading import ConfigError
from llama_jax.data.preferences import to_preference
from llama_jax.data.record_files import Record
from llama_jax.inference.sampling_choice import Wishes
from llama_jax.synthesis import critic
from llama_jax.synthesis.answers import ExactAnswer
from llama_jax.synthesis.correcting import is_poor
from llama_jax.synthesis.critic import Criticism, correct_by_model
from llama_jax.synthesis.edits import correct_by_edits
from llama_jax.synthesis.journal import read_journal
from llama_jax.synthesis.prompts import SynthesisError, make_prompts
from llama_jax.synthesis.rejection import score_and_select
from llama_jax.synthesis.selecting import Judged

VERIFIERS = [ExactAnswer()]
# The first two have a right answer, the others none.
ANSWERS = [["A: 7", "A: 8"], ["A: 7", "7"], ["A: 1", "A: 2"], ["A: 3", "A: 3"], [" ", ""]]
SCORES = {"A: 7": 1.0, "7": 0.5, "A: 8": 0.3, "A: 1": -1.0, "A: 2": 0.25, "A: 3": 0.0}
SCORES |= {" ": 0.0, "": 0.0, "=7": 2.0}
CRITICISM = Criticism(tries=2, wishes=Wishes(temperature=0.2), max_new_tokens=8)


@functools.cache
def saying(reply):
    return scripted_session(["\n", reply, "<|eot_id|>"])


def rejected(folder, *, scores=None, verifiers=VERIFIERS):
    prompts = make_prompts(
        [{"prompt": f"{{answer}} {i}?", "answer": 7} for i in range(len(ANSWERS))]
    )
    write_samples(folder, prompts, ANSWERS)
    options = {
        "open_scorer": None if scores is None else lambda: Stored(scores),
        "verifiers": verifiers,
    }
    score_and_select(prompts, folder, **options)
    return prompts, options


def read(folder):
    """(question, answer) of the conversations, and the preferences as training reads them."""
    conversations = [
        [message["content"] for message in record["messages"]]
        for record in lines(folder / "critic" / "conversations.jsonl")
    ]
    preferences = [
        to_preference(Record("p", 1, record), strength="slightly")
        for record in lines(folder / "critic" / "preferences.jsonl")
    ]
    return conversations, preferences


def spelled(preference):
    """{role: text}, and its pairs as (better, worse, strength)."""
    roles = [response.role for response in preference.responses]
    texts = {r.role: r.messages[0].content for r in preference.responses}
    pairs = {(roles[p.chosen - 1], roles[p.rejected - 1], p.strength) for p in preference.pairs}
    return texts, pairs


def test_prompts_without_a_right_answer_are_corrected_and_make_edited_preferences(tmp_path):
    prompts, options = rejected(tmp_path, scores=SCORES)
    done = correct_by_model(saying("=7"), prompts, tmp_path, CRITICISM, **options)
    assert done.to_json() == {"poor": 3, "corrected": 2, "refused": {"nothing to correct": 1}}
    conversations, preferences = read(tmp_path)
    assert conversations == [["{answer} 2?", "=7"], ["{answer} 3?", "=7"]]
    # A: 2 scores higher than A: 1, so edited over A: 2 over A: 1.
    texts, pairs = spelled(preferences[0])
    assert texts == {"edited": "=7", "chosen": "A: 2", "rejected": "A: 1"}
    assert pairs == {
        ("edited", "chosen", "better"),
        # sigmoid(0.25 + 1.0) is 0.777, under 0.8.
        ("chosen", "rejected", "slightly"),
        ("edited", "rejected", "significantly"),
    }
    # Both samples of the other say the same: one pair, the edit over it.
    texts, _ = spelled(preferences[1])
    assert texts == {"chosen": "=7", "rejected": "A: 3"}


def test_the_critic_is_shown_question_and_best_answer_and_its_reasons_if_asked_for(
    tmp_path, monkeypatch
):
    prompts, options = rejected(tmp_path, scores=SCORES)
    asked, original = [], critic.sample_prompts

    def spy(session, prompts, path, **options):
        asked.extend(prompts)
        return original(session, prompts, path, **options)

    monkeypatch.setattr(critic, "sample_prompts", spy)
    telling = dataclasses.replace(CRITICISM, tell_reasons=True)
    correct_by_model(saying("=7"), prompts, tmp_path, telling, **options)
    assert [prompt.number for prompt in asked] == [2, 3]
    text = asked[0].request.prompt
    # Braces of the question stay what they are.
    assert "\nQuestion:\n{answer} 2?\n\nAnswer:\nA: 2\n\nIt was found: 2 is not 7\n" in text
    assert asked[0].kept_messages[0].content == "{answer} 2?"


def test_a_correction_that_is_wrong_is_not_kept(tmp_path):
    prompts, options = rejected(tmp_path)
    done = correct_by_model(saying("=9"), prompts, tmp_path, CRITICISM, **options)
    assert done.to_json() == {
        "poor": 3,
        "corrected": 0,
        "refused": {"nothing to correct": 1, "no correction is better": 2},
    }
    assert read(tmp_path) == ([], [])


def test_by_scores_alone_a_correction_must_reach_the_threshold(tmp_path):
    prompts, options = rejected(tmp_path, scores=SCORES, verifiers=())
    low = dataclasses.replace(CRITICISM, threshold=0.9)
    done = correct_by_model(saying("=7"), prompts, tmp_path, low, **options)
    # Of the first two the best scores 1; all others are below 0.9.
    assert (done.poor, done.corrected) == (3, 2)
    (tmp_path / "again").mkdir()
    prompts, options = rejected(tmp_path / "again", scores=SCORES | {"=7": 0.8}, verifiers=())
    done = correct_by_model(saying("=7"), prompts, tmp_path / "again", low, **options)
    assert done.refused["no correction is better"] == 2


def test_a_second_call_asks_the_critic_nothing_and_changes_nothing(tmp_path):
    prompts, options = rejected(tmp_path)
    first = correct_by_model(saying("=7"), prompts, tmp_path, CRITICISM, **options)
    before = {p.name: p.read_bytes() for p in (tmp_path / "critic").iterdir()}

    def silent(stage):
        return lambda done, total: None if "scoring" in stage else pytest.fail(stage)

    again = correct_by_model(saying("=7"), prompts, tmp_path, CRITICISM, progress=silent, **options)
    assert again == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "critic").iterdir()} == before


def test_corrections_say_where_they_come_from(tmp_path):
    prompts, options = rejected(tmp_path, scores=SCORES)
    correct_by_model(saying("=7"), prompts, tmp_path, CRITICISM, **options)
    record = lines(tmp_path / "critic" / "conversations.jsonl")[0]["provenance"]
    header, _ = read_journal(tmp_path / "critic" / "samples.jsonl")
    assert record["model"] == header["model"]
    assert (record["prompt"], record["k"], record["kept"]) == (2, 2, 0)
    assert record["scores"] == [2.0, 2.0]
    assert record["verdicts"][0]["answer"]["reason"] == "7 is 7"
    record = lines(tmp_path / "critic" / "preferences.jsonl")[0]["provenance"]
    assert (record["chosen"], record["rejected"], record["edit"]["kept"]) == (1, 0, 0)
    assert record["model"]["path"] == "policy"


def edit(tmp_path, folder, *entries, **options):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    prompts, given = rejected(folder)
    return correct_by_edits(path, prompts, folder, **{**given, **options})


def test_a_persons_edits_are_verified_and_kept_with_their_author(tmp_path):
    done = edit(
        tmp_path,
        tmp_path / "out",
        {"prompt": 2, "edited": "3 + 4 = 7\nA: 7", "author": "ann"},
        {"prompt": 0, "edited": "It is 7."},
        {"prompt": 4, "edited": "A: 9"},
    )
    assert done.to_json() == {
        "poor": 3,
        "corrected": 2,
        "refused": {"the edit is not better": 1},
    }
    conversations, preferences = read(tmp_path / "out")
    assert conversations == [["{answer} 0?", "It is 7."], ["{answer} 2?", "3 + 4 = 7\nA: 7"]]
    texts, pairs = spelled(preferences[0])
    assert texts == {"edited": "It is 7.", "chosen": "A: 7", "rejected": "A: 8"}
    assert ("chosen", "rejected", "significantly") in pairs
    # Without scores, wrong answers have no order: the edit stands over the first alone.
    assert spelled(preferences[1])[0] == {"chosen": "3 + 4 = 7\nA: 7", "rejected": "A: 1"}
    authors = [r.model for p in preferences for r in p.responses if "7" in r.messages[0].content]
    assert "ann" in authors


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"prompt": 1}, "edits.jsonl:1: not an object with 'prompt' and 'edited'"),
        ({"prompt": 5, "edited": "x"}, "edits.jsonl:1: prompt 5 is not one of 0 to 4"),
        ({"prompt": True, "edited": "x"}, "prompt True is not one of"),
        ({"prompt": 1, "edited": " "}, "edits.jsonl:1: 'edited' is no text"),
        ({"prompt": 1, "edited": "x", "author": 3}, "'author' is no text"),
        ({"prompt": 1, "edited": "A: 7 "}, "says what a sample of prompt 1 says"),
    ],
)
def test_an_edit_that_is_none_is_told_by_its_line(tmp_path, entry, complaint):
    with pytest.raises(SynthesisError, match=complaint):
        edit(tmp_path, tmp_path / "out", entry)


def test_two_edits_of_one_prompt_are_refused(tmp_path):
    entry = {"prompt": 2, "edited": "A: 7"}
    with pytest.raises(SynthesisError, match=r"edits.jsonl:2: prompt 2 has an edit already"):
        edit(tmp_path, tmp_path / "out", entry, entry)


def test_corrections_need_something_to_be_held_against(tmp_path):
    prompts, options = rejected(tmp_path)
    with pytest.raises(ConfigError, match="need a reward model or a verifier"):
        correct_by_model(saying("=7"), prompts, tmp_path, CRITICISM)
    low = dataclasses.replace(CRITICISM, threshold=0.0)
    with pytest.raises(ConfigError, match="threshold: nothing is scored"):
        correct_by_model(saying("=7"), prompts, tmp_path, low, **options)
    with pytest.raises(ConfigError, match=r"template: has no \{answer\}"):
        Criticism(template="{question}")
    with pytest.raises(ConfigError, match=r"template: has no \{findings\}"):
        Criticism(template="{question} {answer}", tell_reasons=True)


def test_poor_is_none_right_or_all_below_the_threshold():
    def judged(scores, passed):
        verdicts = [{} if p is None else {"v": {"passed": p}} for p in passed]
        return Judged({"responses": [{}] * len(passed)}, scores, verdicts)

    assert is_poor(judged(None, [False, False]))
    assert not is_poor(judged(None, [False, True]))
    assert is_poor(judged([0.1, 0.2], [None, None]), 0.3)
    assert not is_poor(judged([0.1, 0.2], [None, None]), 0.2)
    assert is_poor(judged([0.1, 0.2], [True, True]), 0.3)
    assert not is_poor(judged([0.1], [None]))

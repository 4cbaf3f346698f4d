"""Each case marks its targets in square brackets; the sign at the end of the line, or after a target (`=+`),
is the reading wanted: - negated, ? uncertain, + affirmed."""

from __future__ import annotations

import random
import re
import string
import time
from pathlib import Path

import pytest

from ontology.assertion import Reading, assertions, readings
from retrieval.types import Assertion

SIGNS = {"-": Assertion.negated, "?": Assertion.uncertain, "+": Assertion.affirmed}
TARGET = re.compile(r"\[([^\]]*)\](?:=([-+?]))?")

TRAPS = {
    "a scope ends": r"""
        no chest pain but has [fever] +
        No effusion; [cardiomegaly]. +
        No pneumothorax, although there is an [effusion]. +
        She denied [headache], however she complained of [nausea]=+. -
        While no [edema] is seen, there is [cardiomegaly]=+. -
        No [abnormality] other than [cardiomegaly]=+. -
        Other than [cardiomegaly], no [abnormality]=-. +
        The chest is unremarkable except for [scarring]. +
        No evidence of [pneumonia] as cause of [fever]=+. -
        no fever and has [cough] +
        No [infiltrate] and there is [cardiomegaly]=+. -
        No effusion, heart is [enlarged]. +
        No pneumothorax, small left [effusion] is seen. +
        No pneumothorax with a small [effusion]. +
        No [bleeding], [infection], and was discharged with a [drain]=+. -
        Patient was admitted without [fever] and with [hypotension]=+. -
        Without any [nausea], vomiting but with [diarrhea]=+ -
        He denied any [fever] at home, but he had [chills]=+. -
        CT negative for [PE], positive for [pneumonia]=+. -
        Lungs hyperexpanded without [infiltrate], consistent with [COPD]=+. -
        No [effusion] (small [pneumothorax]=+). -
        [effusion] (no pneumothorax) +
        He had [nausea] without [vomiting]=-. +
        He presented with [fever], no [cough]=-, and [dyspnea]. +
        Patient with no [chest pain] who presents with [dyspnea]=+. -
        There is [effusion], which is unchanged. +
        Minimal [atelectasis] in the left base, otherwise lungs are clear. +
    """,
    "a list is one scope": r"""
        No effusion, [pneumothorax] or edema. -
        No effusion, pneumothorax or [edema]. -
        No [effusion], [pneumothorax] and [edema] are identified. -
        no [consolidation] or large [pleural effusion] -
        No focal consolidation, pneumothorax, or definite pleural [effusion] identified (see above). -
        Cardiomegaly without [edema], [effusion], or [pneumothorax]. -
        There is no evidence for [pneumonia], [effusion], [pneumothorax], or [masses]. -
        No pleural effusion, pneumothorax or interval airspace [consolidation] to suggest [pneumonia]. -
        Patient denies any [chest pain], nausea, or [vomiting]. -
        denied [SOB]/[CP]/[palpitations] -
        The lungs are grossly clear of focal airspace disease, [pneumothorax], pleural [effusion]. -
        Neither [effusion] nor [pneumothorax]. -
        No [murmurs], rubs, or [gallops]. -
        no [fevers],\n[chills],\nor [sweats] -
        SOCIAL HISTORY: No [tobacco], [alcohol] or drugs. -
        DENIES CHEST PAIN, [SOB], HAS [COUGH]=+. -
    """,
    "a cue before": r"""
        without evidence of [pneumonia] -
        Lungs are clear of [infiltrate]. -
        The lungs are free of [infiltrates]. -
        absence of [edema]. -
        negative for [fracture] or [dislocation]. -
        fails to demonstrate [pneumonia]. -
        Chest x-ray did not show [pneumonia]. -
        He was ruled out for [MI] with serial enzymes. -
        CT excluded [PE]. -
        nothing to suggest [pneumonia] -
        Scarring rather than [pneumonia]. -
        unlikely to represent [pneumonia] -
        This was felt unlikely to be [pneumonia]. -
        Not consistent with [pneumonia]. -
        No infiltrate consistent with [pneumonia]. -
        Resolved [pneumonia]. -
        with interval resolution of small [edema] -
        There has been complete resolution of the [effusion]. -
        No longer has [pneumothorax]. -
        Patient no longer complains of [pain]. -
        Removal of [Swan-Ganz catheter]. No [pneumothorax]. -
        Findings argue against [pneumonia]. -
        Normal [heart size]. -
        Does not appear to be a [hydropneumothorax]. -
        She denies that she has [chest pain]. -
        No nodules suspicious for [malignancy]. -
        abdomen was non[tender] -
        Heart is [not enlarged]. -
        The heart is not [enlarged]. -
        no known [coronary disease] -
        no definite evidence of [pneumothorax], although evaluation is limited -
        lack of [edema] -
        unremarkable for [fracture] -
        w/o [edema] -
        He doesn't have [asthma]. -
    """,
    "a cue behind": r"""
        The [pneumothorax] is not seen. -
        [Pneumothorax] not identified. -
        [Pneumothorax] is no longer seen. -
        [Pneumonia] was ruled out. -
        [MI] ruled out. -
        [PE] was excluded by CT. -
        [Effusion] has resolved. -
        The patient's [chest pain] has completely resolved. -
        [Consolidation] has cleared. -
        The [chest tube] was removed. -
        [Pneumonia] is unlikely. -
        [Pulmonary embolism] was felt to be unlikely. -
        The [heart] is unremarkable. -
        [Pleural effusion] is absent. -
        [chest pain] free -
        [Rales] were not appreciated. -
        [Hepatitis B surface antigen] was negative. -
        There was concern for [pneumonia], but this was ruled out. -
        The possible [pneumonia], which was ruled out. -
        [Abscess], ruled out. -
        [Effusion] is small and pneumothorax is not seen. +
        [Cardiomegaly] is present, [pneumothorax]=- is not seen. +
        He had a [headache] and denied [vomiting]=-. +
        [Pneumothorax], [effusion] and [edema] are not seen. -
    """,
    "a colon or a question answers": r"""
        [Pneumothorax]: none -
        [Murmurs]: none. -
        [Fever]: no. -
        [Cough]=+: yes. [Fever]: no. -
        [Chest pain]? No. -
        [Chest pain] - denies -
        (-) [fever], (+) [cough]=+ -
        (+) [cough], (-) [fever]=- +
        Extremities: no [edema]. -
        REVIEW OF SYSTEMS: Negative for [chest pain], shortness of breath, [palpitations]. -
        Lungs: No [infiltrate]. Heart: [Enlarged]=+. Pleura: No [effusion]. -
        Pleura: no evidence of [effusion]. -
    """,
    "what looks like a denial and is none": r"""
        no change in [cardiomegaly] +
        No change in the [cardiomegaly] or [effusion]. +
        no increase in [effusion] +
        without significant change in [edema] +
        [Effusion] is not significantly changed. +
        The [nodule] has not changed. +
        not only [pneumonia] but also [effusion] +
        gram negative [sepsis] +
        Resolving [pneumonia]. +
        [Edema] has improved. +
        Partial resolution of [effusion]. +
        Incompletely resolved [pneumonia]. +
        The patient was not given aspirin for [chest pain]. +
        There is an [effusion] not seen previously. +
        [Effusion] not present on prior study is now seen. +
    """,
    "a double denial": r"""
        [Effusion] has not resolved. +
        The [pneumonia] has not yet resolved. +
        [Chest tube] has not been removed. +
        Does not deny [chest pain]. +
        not without [pain] +
        Not free of [disease]. +
        No doubt this is [cancer]. +
        [Fracture] is not excluded. ?
        [Aspiration] was not ruled out. ?
        No evidence to exclude [PE]. ?
    """,
    "a doubt": r"""
        possible [pneumonia] ?
        Probable [granuloma]. ?
        Likely [atelectasis]. ?
        There may be a small [effusion]. ?
        The opacity could represent [atelectasis], [infiltrate], or [mass]. ?
        Opacity may be partially due to [mass]. ?
        most XXXX represents [atelectasis] ?
        cannot exclude [pneumonia] ?
        [Pneumonia] cannot be excluded. ?
        A small [pneumothorax] cannot be entirely excluded. ?
        A tiny [pneumothorax] would be difficult to exclude. ?
        Cannot rule out [fracture]. ?
        rule out [pneumonia] ?
        R/O [PE] ?
        Evaluate for [pneumonia]. ?
        Please correlate clinically for [pneumonia]. ?
        ?[nodule] ?
        [Nodule]? ?
        [Effusion] is suspected. ?
        [Pneumonia] is less likely. ?
        [atelectasis] versus [pneumonia] ?
        Atelectasis vs. [pneumonia]. ?
        [CHF] vs [pneumonia]. ?
        subsegmental [atelectasis] or [scarring] ?
        Differential includes [pneumonia], small [infiltrate], [scarring]. ?
        Return if [fever] develops. ?
        She should return if she has [fever], chills, or [bleeding]. ?
        It is unclear whether this is secondary to [cardiomegaly] or pericardial [effusion]. ?
        In the appropriate clinical setting this is compatible with [pneumonia]. ?
        Findings are consistent with [pneumonia]. +
    """,
    "a mask of the de-identification": r"""
        There is no XXXX of a [pleural effusion]. -
        There are no XXXX of a [pleural effusion]. -
        No XXXX [pneumothorax]. -
        Lungs XXXX clear without XXXX [infiltrate]. -
        XXXX XXXX. [Cardiomegaly]. +
        No effusion. XXXX [cardiomegaly]. +
    """,
    "sentences end where they end": r"""
        1.No evidence of [pneumonia] -
        No [effusion].No [pneumothorax].[Cardiomegaly]=+. -
        1. No [infiltrate] 2. [Cardiomegaly]=+ -
        1) No [infiltrate] 2) [Cardiomegaly]=+ -
        No [effusion]\n[cardiomegaly]=+ -
        - No effusion\n- [Cardiomegaly] +
        * No [infiltrate]\n* [Cardiomegaly]=+ -
        IMPRESSION:\n1. No [effusion].\n2. [Cardiomegaly]=+. -
        No [effusion] per Dr. Smith or [pneumothorax]. -
        No pneumonia vs. [edema]. -
        No 2.5 cm [nodule]. -
        The patient denies any history of hypertension or of\n[diabetes]. -
        The patient denies any abdominal discomfort or shortness\nof breath with [chest pain]. -
        No evidence of [active\ndisease]. -
        No [pneumonia] Heart: [enlarged]=+ -
        No [effusion],[pneumothorax]. -
    """,
    "case means nothing": r"""
        The patient DENIES CHEST PAIN, [SOB]. -
        The patient denies CHEST PAIN or [SHORTNESS OF BREATH]. -
        FINDINGS: [ATELECTASIS] IS PRESENT. +
        NO [PLEURAL EFFUSION] OR [PNEUMOTHORAX]. THERE IS [CARDIOMEGALY]=+. -
        There is no [PLEURAL EFFUSION] seen; [CARDIOMEGALY]=+ noted. -
        [PNEUMONIA] WAS RULED OUT. -
    """,
    "sections and other people": r"""
        INDICATION: [Pneumonia]. FINDINGS: The heart is normal. ?
        Reason for exam: [pneumonia] ?
        HISTORY: [Cough]. FINDINGS: no [infiltrate]=-. ?
        INDICATION: Evaluate for [effusion].\nFINDINGS: There is [cardiomegaly]=+. ?
        CLINICAL HISTORY: [Chest pain], no [fever]=-. IMPRESSION: [Pneumonia]=+. ?
        PAST MEDICAL HISTORY: [COPD], CHF. +
        The patient has a history of [hypertension] but denies [diabetes]=-. +
        He denies any history of [asthma]. -
        Family history of [diabetes]. ?
        FAMILY HISTORY: [Diabetes] in father. ?
        No family history of [CAD]. -
        Her mother died of [lung cancer]. ?
        His mother states he has had [fever]. +
    """,
}


def parse(case: str) -> tuple[str, list[tuple[int, int]], list[Assertion]]:
    body, default = case[:-2].replace("\\n", "\n"), case[-1]
    text, spans, wanted, at = "", [], [], 0
    for match in TARGET.finditer(body):
        text += body[at : match.start()]
        spans.append((len(text), len(text) + len(match[1])))
        wanted.append(SIGNS[match[2] or default])
        text += match[1]
        at = match.end()
    return text + body[at:], spans, wanted


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(line.strip(), id=f"{trap}: {line.strip()}")
        for trap, lines in TRAPS.items()
        for line in lines.strip().splitlines()
    ],
)
def test_a_case_reads_as_marked(case: str) -> None:
    text, spans, wanted = parse(case)
    assert assertions(text, spans) == wanted


@pytest.mark.parametrize("case", (Path(__file__).parent / "assertion_cases.txt").read_text().splitlines())
def test_sentences_of_reports_and_discharge_summaries_read_as_marked(case: str) -> None:
    text, spans, wanted = parse(case)
    assert assertions(text, spans) == wanted


@pytest.mark.parametrize("case", ["No [effusion], [pneumothorax] or [edema]. -", "possible [mass] or [nodule] ?"])
def test_the_order_of_the_spans_does_not_matter(case: str) -> None:
    text, spans, wanted = parse(case)
    assert assertions(text, spans[::-1]) == wanted[::-1]
    assert [assertions(text, [span])[0] for span in spans] == wanted


def test_a_reading_names_its_cue() -> None:
    text = "Possible mass. No effusion. Edema. History of asthma."
    spans = [(text.index(word), text.index(word) + len(word)) for word in ("mass", "effusion", "Edema", "asthma")]
    assert readings(text, spans) == [
        Reading(Assertion.uncertain, "possible"),
        Reading(Assertion.negated, "no"),
        Reading(Assertion.affirmed, ""),
        Reading(Assertion.affirmed, "past"),
    ]


@pytest.mark.parametrize(
    ("text", "word", "cue"),
    [
        ("On a previous outside scan (XXXX), the right upper lobe was consolidated.", "consolidated", "past"),
        ("Pneumonia was seen on the prior chest CT.", "Pneumonia", "past"),
        ("The effusion seen on the prior study has grown.", "effusion", ""),
    ],
)
def test_what_an_earlier_film_showed_is_past_unless_it_is_there_today(text: str, word: str, cue: str) -> None:
    span = (text.index(word), text.index(word) + len(word))
    assert readings(text, [span]) == [Reading(Assertion.affirmed, cue)]


def test_no_spans_give_no_assertions() -> None:
    assert assertions("No effusion.", []) == []


@pytest.mark.parametrize(
    "text", ["", " ", "\x00\x07", "胸水なし。心拡大あり。", "Kein Pleuraerguss, kein Pneumothorax", "İ no İ"]
)
def test_any_text_and_any_span_get_an_answer(text: str) -> None:
    spans = [(0, len(text)), (len(text), len(text)), (0, 0), (len(text) + 5, len(text) + 9)]
    assert len(assertions(text, spans)) == len(spans)


def test_offsets_survive_letters_that_change_length_in_lower_case() -> None:
    text = "İİİİ. No effusion. Edema"
    spans = [(text.index(word), text.index(word) + len(word)) for word in ("effusion", "Edema")]
    assert assertions(text, spans) == [Assertion.negated, Assertion.affirmed]


def test_random_text_never_fails() -> None:
    rng = random.Random(0)
    pieces = ["no", "not", "or", ",", ".", "\n", ":", "?", "(", ")", "-", "effusion", "is", "seen", "1.", " ", "Dr."]
    pieces += list(string.punctuation)
    for _ in range(300):
        text = " ".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
        ends = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        assert assertions(text, [(ends[0], ends[1])])


def test_a_megabyte_without_a_full_stop_is_read_in_seconds() -> None:
    text = "no effusion or edema and pneumothorax, " * 26_000
    spans = [(at, at + 8) for at in range(3, len(text) - 8, 39 * 100)]
    started = time.perf_counter()
    assert len(assertions(text, spans)) == len(spans)
    assert time.perf_counter() - started < 20

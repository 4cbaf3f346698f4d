"""Each case marks its targets in square brackets; the sign at the end of the line (or after a target, `=+`)
is the reading wanted: - negated, ? uncertain, + affirmed."""

from __future__ import annotations

import re

import pytest

from ontology.assertion import assertions
from retrieval.types import Assertion

SIGNS = {"-": Assertion.negated, "?": Assertion.uncertain, "+": Assertion.affirmed}
TARGET = re.compile(r"\[([^\]]*)\](?:=([-+?]))?")

CASES = """
no chest pain but has [fever] +
No effusion, [pneumothorax] or edema. -
No effusion, pneumothorax or [edema]. -
without evidence of [pneumonia] -
[Pneumothorax]: none -
1.No evidence of [pneumonia] -
no change in [cardiomegaly] +
not only [pneumonia] but also [effusion] +
cannot exclude [pneumonia] ?
[Pneumonia] cannot be excluded. ?
There is no XXXX of a [pleural effusion]. -
INDICATION: [Pneumonia]. FINDINGS: The heart is normal. ?
[atelectasis] versus [pneumonia] ?
possible [pneumonia] ?
The patient DENIES CHEST PAIN, [SOB]. -
DENIES CHEST PAIN, SOB, HAS [COUGH]. +
Patient denies any [chest pain], nausea, or [vomiting]. -
He was ruled out for [MI]. -
[Pneumonia] was ruled out. -
[MI] ruled out. -
[Effusion] has resolved. -
The [pneumothorax] is not seen. -
[Pneumothorax] is no longer seen. -
The [chest tube] was removed. -
No longer has [pneumothorax]. -
negative for [fracture] or [dislocation]. -
Lungs are clear of [infiltrate]. -
fails to demonstrate [pneumonia]. -
absence of [edema]. -
Scarring rather than [pneumonia]. -
[Pneumonia] is unlikely. -
unlikely to represent [pneumonia] -
The [heart] is unremarkable. -
Normal [heart size]. -
No effusion, heart is [enlarged]. +
No pneumothorax, small left [effusion] is seen. +
No effusion, pneumothorax, or edema is seen; [cardiomegaly]. +
No effusion, [pneumothorax] and edema are identified. -
There is [cardiomegaly], however no [effusion]=-. +
[Effusion] has not resolved. +
Does not deny [chest pain]. +
not without [pain] +
No pneumothorax with a small [effusion]. +
No pneumothorax, although there is an [effusion]. +
There is [effusion], which is unchanged. +
There was concern for [pneumonia], but this was ruled out. -
No evidence of [CHF], per Dr. Smith. -
Seen by Dr. Smith, no [CHF] -
Atelectasis vs. [pneumonia]. ?
Resolving [pneumonia]. +
Resolved [pneumonia]. -
interval resolution of [edema] -
No definite [pneumothorax]. -
abdomen was non[tender] -
[Cardiomegaly] without edema. +
Cardiomegaly without [edema], effusion, or [pneumothorax]. -
Cardiomegaly is present, [pneumothorax] is not seen. -
[Cardiomegaly] is present, pneumothorax is not seen. +
[Effusion] is small and pneumothorax is not seen. +
No evidence of active disease. Stable [cardiomegaly]. +
no fever and has [cough] +
No [effusion]\\n[cardiomegaly]=+ -
- No effusion\\n- [Cardiomegaly] +
No effusion. [Cardiomegaly]. +
Family history of [diabetes]. ?
rule out [pneumonia] ?
to rule out [pneumonia] ?
R/O [PE] ?
Likely [atelectasis]. ?
Opacity may represent [pneumonia] or [atelectasis]. ?
suspicious for [malignancy] ?
No [nodules] suspicious for malignancy. -
No nodules suspicious for [malignancy]. -
Neither [effusion] nor [pneumothorax]. -
history of [pneumonia] +
PAST MEDICAL HISTORY: [COPD], CHF. +
The patient was without [fever]. -
[chest pain] free -
He is free of [pain]. -
[Pneumothorax] not identified. -
No acute [cardiopulmonary disease]. -
no increase in [effusion] +
without significant change in [edema] +
No [pneumonia] or other acute process. Heart: enlarged. -
[Edema] has improved. +
CT negative for [PE], positive for [pneumonia]=+. -
Return if [fever] develops. ?
No [effusion] (small pneumothorax). -
[effusion] (no pneumothorax) +
Evaluate for [pneumonia]. ?
[Effusion] is suspected. ?
There is no evidence for [pneumonia], [effusion], [pneumothorax], or [masses]. -
no suspicious change in [nodule] +
gram negative [sepsis] +
[Pneumonia] is less likely. ?
The patient has no [fever], chills, or [night sweats]. -
She denied [headache], however she complained of [nausea]=+. -
[Chest pain] was denied. -
Pt denies [SOB] or CP; has [cough]=+ -
The patient did not have any [chest pain]. -
He has never had a [stroke]. -
There is no [edema], clubbing or [cyanosis]. -
Extremities: no [edema]. -
[Murmurs]: none. -
Neuro: [weakness] absent. -
Blood cultures were negative for [bacteremia]. -
no complaints of [pain] -
His [pneumonia] resolved with antibiotics. -
[Fever] resolved. -
The patient's [chest pain] has completely resolved. -
Patient was treated for [pneumonia]. +
He was admitted with [chest pain] and ruled out for [MI]=-. +
No evidence to suggest [PE]. -
[PE] was excluded by CT. -
CT excluded [PE]. -
No [PE] was seen, but there was a [pneumonia]=+. -
without [nausea], vomiting but with [diarrhea]=+ -
Not consistent with [pneumonia]. -
No infiltrate consistent with [pneumonia]. -
Findings are consistent with [pneumonia]. +
findings compatible with [CHF] +
The patient is not [diabetic]. -
There is no focal [consolidation], large [effusion], or pneumothorax. -
no [consolidation] or large [pleural effusion] -
No focal consolidation, pneumothorax or large [pleural effusion]. -
The lungs are clear without [focal infiltrate]. -
Lungs are clear bilaterally with no focal [infiltrate], [pleural effusion], or [pneumothoraces]. -
No pneumothorax or pleural effusion. Mild [cardiomegaly]. +
Heart size within normal limits; [calcified granuloma] in the left lung. +
Stable [cardiomegaly] without [edema]=-. +
The heart is not [enlarged]. -
No radiographic evidence of [tuberculosis]. -
[Infiltrate] has cleared. -
Interval clearing of [infiltrate]. -
Interval removal of [chest tube]. No [pneumothorax]=-. -
Right [chest tube] has been removed. -
[Pneumothorax] persists. +
Previously seen [nodule] is not visualized. -
The previously noted [effusion] is no longer present. -
There has been complete resolution of the [effusion]. -
[Effusion] has nearly resolved. +
Partial resolution of [effusion]. +
There may be a small [effusion]. ?
Cannot rule out [fracture]. ?
[Fracture] is not excluded. ?
A small [pneumothorax] cannot be entirely excluded. ?
Questionable [nodule]. ?
? [nodule] ?
?[nodule] ?
[Effusion] vs atelectasis. ?
[Nodule]? ?
Concern for [malignancy]. ?
Differential includes [pneumonia] and [edema]. ?
Probable [granuloma]. ?
If [symptoms] worsen, call. ?
The opacity could represent [atelectasis], [infiltrate], or [mass]. ?
no definite evidence of [pneumothorax], although evaluation is limited -
No [pneumonia], [effusion] or [CHF]. Patient has [cough]=+. -
Chest x-ray showed no [pneumonia]. -
Chest x-ray did not show [pneumonia]. -
No acute [fracture] identified, however [osteopenia]=+ noted. -
No bony abnormality. [Scoliosis]. +
no fevers,\\n[chills],\\nor sweats -
REVIEW OF SYSTEMS: Negative for [chest pain], shortness of breath, [palpitations]. -
HISTORY: [Cough]. FINDINGS: no [infiltrate]=-. ?
Reason for exam: [pneumonia] ?
INDICATION: Evaluate for [effusion].\\nFINDINGS: There is [cardiomegaly]=+. ?
IMPRESSION: [PNEUMONIA]. +
IMPRESSION:\\n1. No [effusion].\\n2. [Cardiomegaly]=+. -
FINDINGS: [ATELECTASIS] IS PRESENT. +
The [CHF]: stable. +
No [effusion],[pneumothorax]. -
Findings suggest [edema]. ?
not suspicious for [malignancy] -
No [mass] lesion, [hemorrhage], or [midline shift]. -
low suspicion for [PE] ?
[Hilar adenopathy] is absent. -
[Ascites] negative. -
lack of [edema] -
nothing to suggest [pneumonia] -
Free of [disease] -
[Effusion], not seen on prior. +
There is an [effusion] not seen previously. +
A [nodule] is seen that was not seen on the prior. +
[Effusion] not present on prior study is now seen. +
No evidence of [pneumonia] as cause of [fever]=+. -
No [pneumonia] because of [fever]=+. -
not [pneumonia] -
No [pleural effusion] is seen on the right. There is a left [effusion]=+. -
Aorta is [tortuous] and [calcified]. +
no [focal airspace disease] and [heart size] is normal. -
Negative for [pneumothorax], [pleural effusion] or focal consolidation. -
No [pneumothoraces] or effusions. -
No obvious [fractures]. -
no large [effusion] -
There is no change in the right [effusion]. +
No new [infiltrate]. -
Patient has no known [coronary disease]. -
Mother had [breast cancer]. ?
He denies any history of [asthma]. -
Deny [chest pain] -
She denies that she has [chest pain]. -
The patient denied having [chest pain], but reported [dyspnea]=+. -
[Pneumonia] has been ruled out. -
[Abscess], ruled out. -
unremarkable for [fracture] -
[Aspiration] is not likely. -
not likely to be [cancer] -
It is doubtful that this is [cancer]. ?
No doubt this is [cancer]. +
absence of [breath sounds] -
no longer any [effusion] -
Patient no longer complains of [pain]. -
improbable [PE] -
[effusion] has decreased but not resolved +
[Effusion] has not completely resolved. +
No [pericardial effusion] with [normal] heart. -
No residual [pneumothorax]. -
There is no evidence of [pneumothorax] after removal of the [chest tube]=-. -
minimal to no [effusion] -
no significant [edema] -
Lungs: No [infiltrate]. Heart: [Enlarged]=+. Pleura: No [effusion]=-. -
"""


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


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_a_case_reads_as_marked(case: str) -> None:
    text, spans, wanted = parse(case)
    assert assertions(text, spans) == wanted


def test_no_spans_give_no_assertions() -> None:
    assert assertions("No effusion.", []) == []

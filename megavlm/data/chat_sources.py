"""Conversation formats of families whose folders bring no chat template, as Jinja sources; data.chat_template takes their names."""

from __future__ import annotations

# PaliGemma (https://arxiv.org/abs/2407.07726, section 3.2; transformers 5.23, models/paligemma/processing_paligemma.py): the pictures,
# bos, the question, a line break; then the answer and eos. One question and one answer.
_PALIGEMMA = """\
{%- for m in messages -%}
  {%- if m['role'] == 'assistant' -%}
    {%- generation -%}{{- (m['content'] if m['content'] is string else m['content'][0]['text']) ~ eos_token -}}{%- endgeneration -%}
  {%- elif m['role'] != 'user' or not loop.first -%}
    {{- raise_exception('PaliGemma takes one question and one answer') -}}
  {%- elif m['content'] is string -%}
    {{- bos_token ~ m['content'] ~ '\\n' -}}
  {%- else -%}
    {%- for p in m['content'] if p['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {{- bos_token -}}
    {%- for p in m['content'] if p['type'] == 'text' -%}{{- p['text'] -}}{%- endfor -%}
    {{- '\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""

# BLIP-2 (transformers 5.23, models/blip_2/processing_blip_2.py): the pictures, bos, the question ("Question: ... Answer:") as it stands;
# then the answer and eos. One question and one answer.
_BLIP_2 = """\
{%- for m in messages -%}
  {%- if m['role'] == 'assistant' -%}
    {%- generation -%}{{- (m['content'] if m['content'] is string else m['content'][0]['text']) ~ eos_token -}}{%- endgeneration -%}
  {%- elif m['role'] != 'user' or not loop.first -%}
    {{- raise_exception('BLIP-2 takes one question and one answer') -}}
  {%- elif m['content'] is string -%}
    {{- bos_token ~ m['content'] -}}
  {%- else -%}
    {%- for p in m['content'] if p['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {{- bos_token -}}
    {%- for p in m['content'] if p['type'] == 'text' -%}{{- p['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endfor -%}
"""

SOURCES: dict[str, str] = {"paligemma": _PALIGEMMA, "blip-2": _BLIP_2}

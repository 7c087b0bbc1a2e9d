"""Llama 3's chat format as a Jinja template, for other programs: our own dialogs need none."""

# Renders what data/chat.py encodes; `stop` is the field of our messages, which others lack.
# Whoever encodes the rendered text as a whole joins what we keep apart: a line break that opens a
# content merges with those of the header, and a special token's name in a content is that token.
LLAMA3_TEMPLATE = """\
{%- if tools %}{{ raise_exception('Describe the tools in the system message.') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {%- set calls = message['tool_calls'] or [] if role == 'assistant' else [] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if calls and calls[0]['function']['name'] == 'code_interpreter' %}
        {{- '<|python_tag|>' }}
    {%- endif %}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] or [] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {%- for call in calls %}
        {%- set name = call['function']['name'] %}
        {%- set arguments = call['function']['arguments'] %}
        {%- if name in ['brave_search', 'wolfram_alpha', 'photogen'] %}
            {{- name + '.call(query="' + arguments['query'] + '")' }}
        {%- elif name == 'code_interpreter' %}
            {{- arguments['code'] }}
        {%- else %}
            {%- set function = {'type': 'function', 'name': name, 'parameters': arguments} %}
            {{- function | tojson(ensure_ascii=true) }}
        {%- endif %}
    {%- endfor %}
    {%- if role == 'assistant' and message['stop'] == 'end_of_message' %}
        {{- '<|eom_id|>' }}
    {%- else %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def for_llama_cpp(template: str) -> str:
    """Ours without the one option that llama.cpp's Jinja refuses; anybody else's as it is."""
    if template != LLAMA3_TEMPLATE:
        return template
    return template.replace("tojson(ensure_ascii=true)", "tojson")

"""Chat templates that write tool calls in different ways, each with its tokens, written from the families' rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ToolTemplate:
    """A template, its tokens, and what it can write."""

    name: str
    text: str | None
    end: str = "<|im_end|>"
    special: tuple[str, ...] = ("<|im_start|>", "<|endoftext|>")
    added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    several: bool = True
    """Whether it writes several calls in a turn."""
    beside: bool = True
    """Whether it writes a content beside calls."""
    appends: bool = True
    """Whether what it wrote of a chat stays when the chat goes on."""
    ends: tuple[str, ...] = ()
    """If it ends no turn: the special tokens that begin what follows a text, and what follows calls."""
    own_calls: bool = True
    """Whether it writes calls; else they are text."""
    around_value: tuple[str, ...] = ()
    """The tags before an argument's name and after its value, if each argument has tags of its own."""

    def end_of(self, message: Mapping[str, Any]) -> str:
        """The token that ends a reply."""
        return self.ends["tool_calls" in message] if self.ends else self.end

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per byte, then the template's tokens."""
        names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), self.end, *self.special, *self.added]
        core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(name, normalized=False) for name in (self.end, *self.special)])
        core.add_tokens([AddedToken(name, normalized=False) for name in self.added])
        bos = "<|begin_of_text|>" if self.name.startswith("llama") else "<s>" if "<s>" in self.special else None
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=self.end, bos_token=bos)
        made.chat_template = self.text
        return made


PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call these functions:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>\n\nReply with <tool_call> and the call.<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
"""
_RESULTS = """\
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

HERMES = (
    _TOOLS
    + """\
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or
           (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
"""
    + _RESULTS
)

QWEN3 = (
    _TOOLS
    + """\
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.found = true %}{%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}
            {{- tool_call.arguments | tojson }}{%- endif %}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
"""
    + _RESULTS
)

LLAMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\n\n' + system_message + '<|eot_id|>' }}
{%- if tools %}
    {%- set first_user_message = messages[0].content | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nGiven these functions, respond with a JSON for a call.\n\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
    {{- first_user_message + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- '}' }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == 'user' %}
        {%- if tools is defined and tools is not none and message == user_messages[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\n\n' + message.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}
{%- endfor %}
"""

MISTRAL_ARGS = """\
{{- bos_token }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function.arguments is string %}{%- set arguments = call.function.arguments %}
            {%- else %}{%- set arguments = call.function.arguments | tojson %}{%- endif %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + arguments }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""

DEEPSEEK = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}{{- '\n\n## Tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|tool_calls_begin|>' if loop.first else '\n' }}
            {{- '<|tool_call_begin|>function<|tool_sep|>' + call.function.name + '\n```json\n' }}
            {{- call.function.arguments + '\n```<|tool_call_end|>' }}
            {%- if loop.last %}{{- '<|tool_calls_end|>' }}{%- endif %}
        {%- endfor %}
        {{- '<|end_of_sentence|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|tool_output_begin|>' + message.content + '<|tool_output_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}
"""

GRANITE = """\
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{- '<|start_of_role|>tool_response<|end_of_role|>' + message.content }}
    {%- else %}
        {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}
        {%- if message.tool_calls %}
            {{- '<|tool_call|>[' }}
            {%- for call in message.tool_calls %}
                {{- {'arguments': call.function.arguments, 'name': call.function.name} | tojson }}
                {{- '' if loop.last else ', ' }}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
    {%- endif %}
    {{- '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
"""

QWEN3_CODER = (
    _TOOLS
    + """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content | trim %}{{- '\n' + message.content | trim + '\n' }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function if tool_call.function is defined else tool_call %}
            {{- '\n<tool_call>\n<function=' + call.name + '>\n' }}
            {%- for key, value in call.arguments | items %}
                {{- '<parameter=' + key + '>\n' }}
                {{- value | string if value is string or value is number else (value | tojson) }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role in ('user', 'assistant') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
"""
    + _RESULTS
)

MINIMAX = """\
{%- for message in messages %}
    {%- if loop.first and tools %}
        {{- ']~b]system\n<tools>\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
        {{- '</tools>[e~[\n' }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {{- ']~b]tool\n<response>' + message.content + '</response>[e~[\n' }}
    {%- else %}
        {{- ']~b]' + ('ai' if message.role == 'assistant' else message.role) + '\n' + message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function %}
            {{- '\n<minimax:tool_call>' if loop.first }}
            {{- '\n<invoke name="' + call.name + '">' }}
            {%- for key, value in call.arguments.items() %}
                {{- '\n<parameter name="' + key + '">' + (value if value is string else value | tojson) }}
                {{- '</parameter>' }}
            {%- endfor %}
            {{- '\n</invoke>' }}
            {{- '\n</minimax:tool_call>' if loop.last }}
        {%- endfor %}
        {{- '[e~[\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\n' }}{%- endif %}
"""

GLM = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>\n# Tools\n<tools>\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|assistant|>\n<think>' + (thought if loop.index0 > ns.last else '') + '</think>' }}
        {%- if content.strip() %}{{- '\n' + content.strip() }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function %}
            {{- '\n<tool_call>' + call.name + '\n' }}
            {%- for key, value in call.arguments.items() %}
                {{- '<arg_key>' + key + '</arg_key>\n<arg_value>' }}
                {{- value if value is string else (value | tojson) }}{{- '</arg_value>\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- else %}{{- '<|' + message.role + '|>\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

GEMMA = """\
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant', 'system') %}{{- raise_exception('Unknown role') }}{%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""

SMOLLM3 = """\
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if xml_tools or tools %}
    {{- '\n### Tools\n<tools>\n' }}{%- for tool in tools %}{{- tool | string + '\n' }}{%- endfor %}{{- '</tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

CALL_TAGS = ("<tool_call>", "</tool_call>")
THINK_TAGS = ("<think>", "</think>")
_MINIMAX_TAGS = ("<minimax:tool_call>", "</minimax:tool_call>")
_GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_TAGS = (*CALL_TAGS, "<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
_MISTRAL_TOKENS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL_TOKENS = ("<s>", *_MISTRAL_TOKENS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_DEEPSEEK_TOKENS = ("<s>", "<|User|>", "<|Assistant|>", "<|tool_calls_begin|>", "<|tool_calls_end|>", "<|tool_sep|>")
_DEEPSEEK_TOKENS = (*_DEEPSEEK_TOKENS, "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_output_begin|>")

TOOL_TEMPLATES = (
    ToolTemplate("hermes", HERMES, added=CALL_TAGS),
    ToolTemplate("hermes without tokens for its tags", HERMES),
    ToolTemplate("qwen3", QWEN3, added=(*CALL_TAGS, *THINK_TAGS), appends=False),
    ToolTemplate("llama3_1", LLAMA, "<|eot_id|>", _LLAMA_TOKENS, several=False, beside=False),
    ToolTemplate("mistral", MISTRAL, "</s>", _MISTRAL_TOKENS, beside=False, appends=False),  # tools move along
    ToolTemplate("mistral with [ARGS]", MISTRAL_ARGS, "</s>", (*_MISTRAL_TOKENS, "[ARGS]", "[SYSTEM_PROMPT]")),
    ToolTemplate("deepseek", DEEPSEEK, "<|end_of_sentence|>", (*_DEEPSEEK_TOKENS, "<|tool_output_end|>")),
    ToolTemplate("granite", GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")),
    ToolTemplate("qwen3-coder", QWEN3_CODER, added=CALL_TAGS, around_value=("<parameter=", "</parameter>")),
    ToolTemplate(
        "minimax", MINIMAX, "[e~[", ("]~b]",), _MINIMAX_TAGS, around_value=("<parameter name=", "</parameter>")
    ),
    ToolTemplate(
        "glm4_5",
        GLM,
        "<|endoftext|>",
        _GLM_TOKENS,
        _GLM_TAGS,
        ends=("<|user|>", "<|observation|>"),
        around_value=("<arg_key>", "</arg_value>"),
    ),
    ToolTemplate("smollm3", SMOLLM3, added=CALL_TAGS, own_calls=False),
    ToolTemplate("gemma", GEMMA, "<end_of_turn>", ("<start_of_turn>", "<bos>"), own_calls=False),
    ToolTemplate("plain ChatML", PLAIN, own_calls=False),
    ToolTemplate("none", None, own_calls=False),
)

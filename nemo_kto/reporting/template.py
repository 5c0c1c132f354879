"""The page's HTML and CSS. It is one file that loads nothing: pictures are embedded, there are no scripts."""

PAGE = """\
{% macro show_table(table) %}
{% if table.rows %}
<div class="scroll"><table>
<thead><tr>{% for column in table.columns %}
<th scope="col"{% if column | length < 12 %} class="short"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td{% if cell | length < 16 %} class="short"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% endmacro %}
{% macro show_pictures(pictures) %}
<div class="grid">
{% for picture in pictures %}
<figure>
<img src="data:image/png;base64,{{ picture.png | base64 }}" alt="{{ picture.title }}" loading="lazy">
<figcaption>{{ picture.caption }}
{% for tag in picture.tags %}<code>{{ tag }}</code> {% endfor %}</figcaption>
</figure>
{% endfor %}
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
{{ css | safe }}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">Report of {{ "a KTO run" if runs | length == 1 else runs | length ~ " KTO runs" }},
written by nemo_kto {{ version }} on {{ written }}. Steps of curves count from 0, as in TensorBoard.</p>
<nav>{% for heading in contents %}<a href="#{{ heading | lower }}">{{ heading }}</a> {% endfor %}</nav>
</header>
<section id="summary"><h2>Summary</h2>
{{ show_table(facts) }}
<h3>Final numbers</h3>
{{ show_table(final) }}
</section>
{% if runs | length > 1 %}
<section id="differences"><h2>Differences</h2>
{% if differences.rows %}
<p>Configuration keys and versions in which the runs differ.</p>
{{ show_table(differences) }}
{% elif described > 1 %}
<p>The runs have the same configuration.</p>
{% endif %}
{% if described < runs | length %}
<p class="soft">Runs without a run.json, which holds the configuration: {{ runs | length - described }}.</p>
{% endif %}
</section>
{% endif %}
{% for heading, pictures in sections.items() %}
<section id="{{ heading | lower }}"><h2>{{ heading }}</h2>
{{ show_pictures(pictures) }}
</section>
{% endfor %}
{% if data %}
<section id="data"><h2>Data</h2>
{% for group in data %}
{% if data | length > 1 or group.names | length < runs | length %}<h3>{{ group.names | join(", ") }}</h3>{% endif %}
{{ show_table(group.numbers) }}
{{ show_pictures(group.pictures) }}
<details><summary>Sources</summary>
{{ show_table(group.sources) }}
</details>
{% endfor %}
</section>
{% endif %}
{% if generations %}
<section id="generations"><h2>Generations</h2>
{% for group in generations %}
<h3>{{ group.heading }}</h3>
{% for card in group.cards %}
<article>
<h4>Prompt</h4><pre>{{ card.prompt }}</pre>
{% if card.images %}
<p class="asked">
{% for image in card.images %}<img src="{{ image }}" alt="Image {{ loop.index }} of the prompt"> {% endfor %}
</p>
{% endif %}
<div class="answers">
{% for who, text in card.answers %}<div><h4>{{ who }}</h4><pre>{{ text }}</pre></div>
{% endfor %}
</div>
</article>
{% endfor %}
{% if group.left_out %}<p class="soft">More prompts in generations.jsonl: {{ group.left_out }}.</p>{% endif %}
{% endfor %}
{% if images_left_out %}
<p class="soft">Images of prompts that are left out: {{ images_left_out }}. Shown are PNG and JPEG thumbnails inside
generations.jsonl of at most {{ most_kilobytes }} kB each, {{ most_images }} of a prompt and {{ most_megabytes }} MB on
a page.</p>
{% endif %}
</section>
{% endif %}
{% if unreadable %}
<p class="soft">Lines of generations.jsonl that could not be read and are left out: {{ unreadable }}.</p>
{% endif %}
<section id="series"><h2>All series</h2>
<details><summary>First, lowest, highest and last value of each</summary>
{{ show_table(series) }}
</details>
</section>
{% if configurations %}
<section id="configuration"><h2>Configuration</h2>
{% for item in configurations %}
{% if runs | length > 1 %}<h3>{{ item.name }}</h3>{% endif %}
{{ show_table(item.changed) }}
<details><summary>{{ item.default.rows | length }} keys at their default</summary>
{{ show_table(item.default) }}
</details>
<details><summary>Versions</summary>
{{ show_table(item.versions) }}
</details>
{% endfor %}
</section>
{% endif %}
</body>
</html>
"""

CSS = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1b1b1b;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
h4 { font-size: .8rem; margin: 0; color: #555; overflow-wrap: anywhere; }
.soft, figcaption { color: #555; font-size: .85rem; }
nav a { display: inline-block; margin-right: .8rem; padding: .3rem 0; color: #0059a0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; }
.asked { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .6rem; }
.asked img { width: auto; max-width: 8rem; max-height: 8rem; border: 1px solid #ddd; }
figcaption code { font-size: .75rem; background: #f2f2f2; padding: 0 .3em; border-radius: 3px;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
td { overflow-wrap: anywhere; min-width: 3.5rem; max-width: 30rem; }
.short { white-space: nowrap; }
thead th { color: #555; font-weight: 600; max-width: 14rem; overflow-wrap: anywhere; }
tbody th { font-weight: 500; min-width: 6.6rem; max-width: 22rem; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
article { margin: 0 0 1rem; padding: .7rem; background: #f7f7f7; border-radius: 6px; }
pre { margin: .1rem 0 .6rem; max-height: 18rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.answers { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.answers > div { min-width: 0; padding: .5rem .6rem 0; background: #fff; border-radius: 4px; }
@media (max-width: 30rem) { table { font-size: .82rem; } tbody th { min-width: 6rem; } }
@media print { section, figure, article { break-inside: avoid; } }
"""

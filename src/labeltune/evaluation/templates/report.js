(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const STEP = 25;
  let shown = STEP, cell = null;
  const say = (key) => data.words[key][language.now === "zh" ? 1 : 0];
  const colon = () => (language.now === "zh" ? "：" : ": ");
  const make = (tag, className, content) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  // What comes from the data is not the page's own words: translators, and the tests, leave it alone.
  const foreign = (tag, className, content) => {
    const node = make(tag, className, content);
    node.translate = false;
    return node;
  };
  const ner = data.task === "ner", several = data.task === "multilabel";
  const name = (label) => (label === null || label === "" ? say("offList") : label);

  function choices(id, pairs) {
    const select = at(id), kept = select.value;
    select.replaceChildren(...pairs.map(([value, label]) => {
      const option = make("option", "", label);
      option.value = value;
      option.translate = !value.startsWith("=");
      return option;
    }));
    if (pairs.some(([value]) => value === kept)) select.value = kept;
    select.hidden = pairs.length < 2;
  }

  const labels = new Set(), predicted = new Set();
  for (const row of data.rows) {
    if (ner) {
      for (const hit of row.hits) labels.add(hit[2]);
      for (const [, right, given] of row.errors) { if (right) labels.add(right[2]); if (given) labels.add(given[2]); }
    } else if (several) {
      for (const label of row.right) labels.add(label);
      for (const label of row.given) predicted.add(label);
    } else { labels.add(row.right); predicted.add(row.given ?? ""); }
  }

  function fill() {
    const states = [["all", say("all")], ["wrong", say("wrong")], ["right", say("right")]];
    choices("state", states.concat(data.errors.map((kind) => [kind, say(kind)])));
    const sorted = (set) => [...set].sort().map((label) => ["=" + label, name(label)]);
    choices("right", [["", say(ner ? "anyType" : several ? "anyLabel" : "anyRight")], ...sorted(labels)]);
    choices("given", [["", say("anyGiven")], ...sorted(predicted)]);
    const scored = data.rows.some((row) => row.p);
    choices("order", [["file", say("file")], ...(scored ? [["sure", say("sure")], ["unsure", say("unsure")]] : [])]);
    at("more").textContent = say("more");
    at("search").placeholder = say("search");
    const told = { search: "search", state: "whichRows", right: "rightLabel", given: "predictedLabel", order: "order", clear: "clear" };
    for (const [id, key] of Object.entries(told)) at(id).setAttribute("aria-label", say(key));
  }

  function matches(row) {
    const state = at("state").value, right = at("right").value.slice(1), given = at("given").value.slice(1);
    if (state === "wrong" && row.ok) return false;
    if (state === "right" && !row.ok) return false;
    if (data.errors.includes(state) && !row.errors.some((error) => error[0] === state)) return false;
    if (at("right").value) {
      if (several && !(row.right.includes(right) && (!cell || row.right.includes(cell[1])))) return false;
      if (!ner && !several && row.right !== right) return false;
      if (ner && !row.hits.concat(...row.errors.map((e) => e.slice(1))).some((e) => e && e[2] === right)) return false;
    }
    if (at("given").value && several && !row.given.includes(given)) return false;
    if (at("given").value && !several && (row.given ?? "") !== given) return false;
    const search = at("search").value.toLowerCase();
    return !search || row.text.toLowerCase().includes(search) || row.id.toLowerCase() === search;
  }

  function bars(row) {
    const box = make("div", "bars");
    for (const [label, p] of row.p) {
      const bar = make("b"), track = make("i");
      bar.style.width = (100 * p).toFixed(1) + "%";
      track.append(bar);
      box.append(foreign("span", "name", label), track, make("span", "", p.toFixed(3)));
    }
    return box;
  }

  const wordy = /[\p{Script=Latin}\p{Script=Cyrillic}\p{Script=Greek}\p{M}\p{N}_]/u;

  function highlighted(row) {
    const box = foreign("div", "text marked"), marks = [];
    const add = (entity, kind) => {
      if (entity && entity[0] !== null) marks.push({ start: entity[0], end: entity[1], label: entity[2], text: entity[3], kind });
    };
    for (const hit of row.hits) add(hit, "right");
    for (const [, right, given] of row.errors) { add(right, "missing"); add(given, "wrong"); }
    marks.sort((a, b) => a.start - b.start || a.end - b.end);
    const points = Array.from(row.text);
    // Marks that overlap, or share a word, stand together: their chips follow the last of them, never inside a word.
    const groups = [];
    for (const mark of marks.filter((m) => m.start < points.length)) {
      let end = Math.min(mark.end, points.length);
      const last = groups[groups.length - 1];
      while (end < points.length && end > 0 && wordy.test(points[end - 1]) && wordy.test(points[end])) end++;
      if (last && mark.start < last.end) { last.marks.push(mark); last.end = Math.max(last.end, end); }
      else groups.push({ start: mark.start, end, marks: [mark] });
    }
    let done = 0;
    const piece = (from, to) => points.slice(from, to).join("");
    for (const group of groups) {
      box.append(piece(done, group.start));
      const borders = [group.start, group.end, ...group.marks.flatMap((m) => [m.start, m.end])];
      const cuts = [...new Set(borders.filter((b) => b <= group.end))].sort((a, b) => a - b);
      for (let i = 0; i + 1 < cuts.length; i++) {
        const covering = group.marks.filter((m) => m.start <= cuts[i] && m.end >= cuts[i + 1]);
        if (!covering.length) { box.append(piece(cuts[i], cuts[i + 1])); continue; }
        const kinds = [...new Set(covering.map((m) => m.kind))].sort();
        if (i && covering.some((m) => m.start === cuts[i])) kinds.push("start");
        box.append(make("mark", kinds.join(" "), piece(cuts[i], cuts[i + 1])));
      }
      const same = group.marks.every((m) => m.start === group.start && m.end === group.marks[0].end);
      for (const mark of group.marks) box.append(make("span", "chip " + mark.kind, same ? mark.label : mark.label + " " + mark.text));
      done = group.end;
    }
    box.append(piece(done, points.length));
    if (row.cut) box.append("…");
    return box;
  }

  function told(...pairs) {
    const line = make("div");
    pairs.forEach(([word, value, own], i) => {
      line.append((i ? " · " : "") + word + colon(), own ? value : foreign("span", "", value));
    });
    return line;
  }

  function draw(row) {
    const card = make("div", "row" + (row.ok ? " ok" : "")), meta = make("div", "meta");
    meta.append(foreign("span", "", "#" + row.id + (row.source ? " · " + row.source : "")));
    if (row.truncated) meta.append(" · " + say("truncated"));
    card.append(meta);
    if (ner) {
      card.append(highlighted(row));
      for (const [kind, right, given] of row.errors) {
        const pairs = [right && [say("rightIs"), right[3] + " (" + right[2] + ")"],
          given && [say("answered"), given[3] + " (" + given[2] + ")"]].filter(Boolean);
        const line = told(...pairs);
        line.className = "bad";
        line.prepend(say(kind) + colon());
        card.append(line);
      }
      if (!row.hits.length && !row.errors.length) card.append(make("div", "soft", say("none")));
    } else {
      const halves = make("div", "halves"), answer = make("div");
      const set = (labels) => [labels.join(", ") || say("noLabels"), !labels.length];
      const line = several ? told([say("rightIs"), ...set(row.right)], [say("answered"), ...set(row.given)])
        : told([say("rightIs"), row.right], [say("answered"), name(row.given), row.given === null]);
      line.className = row.ok ? "good" : "bad";
      answer.append(line);
      if (row.p) answer.append(bars(row));
      halves.append(foreign("div", "text", row.text + (row.cut ? "…" : "")), answer);
      card.append(halves);
    }
    if (row.answer !== undefined && (ner || row.given === null) && !row.p) card.append(foreign("pre", "soft", row.answer));
    return card;
  }

  function list() {
    const found = data.rows.filter(matches), order = at("order").value;
    if (order !== "file") {
      const sign = order === "sure" ? -1 : 1;
      found.sort((a, b) => sign * ((a.p ? a.p[0][1] : 0) - (b.p ? b.p[0][1] : 0)));
    }
    at("count").textContent = found.length + " " + say("rows");
    at("list").replaceChildren(...found.slice(0, shown).map(draw));
    at("more").hidden = found.length <= shown;
  }

  function confusion() {
    const place = at("confusion") ?? at("together"), counts = data.confusion ?? data.together;
    if (!place || !counts) return;
    const rights = Object.keys(counts);
    const columns = [...new Set([...rights, ...rights.flatMap((r) => Object.keys(counts[r]))])]
      .sort((a, b) => (a === "") - (b === "") || (a < b ? -1 : 1));
    const grid = make("table", "confusion"), head = make("tr");
    const named = (label, className) => {
      const cell = make("th", className);
      cell.append(label === "" ? make("span", "name", name(label)) : foreign("span", "name", label));
      return cell;
    };
    head.append(make("th", "side"), ...columns.map((c) => named(c, "")));
    grid.append(head);
    for (const right of rights) {
      const line = make("tr"), total = several ? counts[right][right] : Object.values(counts[right]).reduce((a, b) => a + b, 0);
      line.append(named(right, "side"));
      for (const given of columns) {
        const count = counts[right][given] || 0, box = make("td");
        const button = make("button", "", count || "");
        button.type = "button";
        button.dataset.right = right; button.dataset.given = given;
        button.title = several ? right + " + " + given + " · " + count
          : say("rightIs") + colon() + right + " · " + say("answered") + colon() + name(given) + " · " + count;
        box.style.background = "rgba(var(--heat), " + (0.85 * count / total).toFixed(3) + ")";
        if (cell && cell[0] === right && cell[1] === given) box.className = "chosen";
        button.addEventListener("click", () => {
          cell = [right, given];
          at("state").value = "all"; at("right").value = "=" + right; at("given").value = several ? "" : "=" + given; at("search").value = "";
          shown = STEP; confusion(); list();
          at("rows").scrollIntoView({ behavior: "smooth" });
        });
        box.append(button); line.append(box);
      }
      grid.append(line);
    }
    const wide = make("div", "wide"); wide.append(grid);
    place.replaceChildren(make("h2", "", say(several ? "together" : "confusion")), make("p", "soft", say(several ? "togetherHint" : "hint")), wide);
  }

  language.told.push(() => { fill(); confusion(); list(); });
  for (const id of ["search", "state", "right", "given", "order"]) {
    at(id).addEventListener("input", () => { shown = STEP; cell = null; confusion(); list(); });
  }
  at("more").addEventListener("click", () => { shown += STEP; list(); });
  at("clear").addEventListener("click", () => {
    for (const id of ["search", "right", "given"]) at(id).value = "";
    at("state").value = "all"; shown = STEP; cell = null; confusion(); list();
  });
  // It opens on what went wrong.
  fill();
  at("state").value = data.rows.some((row) => !row.ok) ? "wrong" : "all";
})();

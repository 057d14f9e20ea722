"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const STEP = 25;
  let language = "en", shown = STEP, cell = null;
  const words = {
    all: ["all rows", "全部"], wrong: ["wrong rows", "错误的行"], right: ["right rows", "正确的行"],
    anyRight: ["any right label", "任意真实类别"], anyGiven: ["any predicted label", "任意预测类别"],
    file: ["in file order", "按文件顺序"], sure: ["surest first", "置信度从高到低"], unsure: ["least sure first", "置信度从低到高"],
    more: ["show more", "显示更多"], rows: ["rows", "行"], offList: ["(off the list)", "（不在候选中）"],
    rightIs: ["right", "真实"], answered: ["predicted", "预测"], none: ["no entities", "无实体"],
    confusion: ["Confusion matrix", "混淆矩阵"],
    hint: ["rows are right labels, columns predicted ones; choose a cell to list its rows",
      "行为真实类别，列为预测类别；点击单元格查看对应的行"],
    wrong_type: ["wrong type", "类型错误"], wrong_boundary: ["wrong boundary", "边界错误"],
    wrong_type_and_boundary: ["wrong type and boundary", "类型和边界都错误"], missed: ["missed", "漏掉"],
    spurious: ["spurious", "多报"], anyType: ["any type", "任意类型"], truncated: ["answer cut off", "回答被截断"],
  };
  const say = (key) => words[key][language === "zh" ? 1 : 0];
  const make = (tag, className, content) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const ner = data.task === "ner";
  const name = (label) => (label === null || label === "" ? say("offList") : label);

  function choices(id, pairs) {
    const select = at(id), kept = select.value;
    select.replaceChildren(...pairs.map(([value, label]) => {
      const option = make("option", "", label);
      option.value = value;
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
    } else { labels.add(row.right); predicted.add(row.given ?? ""); }
  }

  function fill() {
    const states = [["all", say("all")], ["wrong", say("wrong")], ["right", say("right")]];
    choices("state", states.concat(data.errors.map((kind) => [kind, say(kind)])));
    const sorted = (set) => [...set].sort().map((label) => ["=" + label, name(label)]);
    choices("right", [["", say(ner ? "anyType" : "anyRight")], ...sorted(labels)]);
    choices("given", [["", say("anyGiven")], ...sorted(predicted)]);
    const scored = data.rows.some((row) => row.p);
    choices("order", [["file", say("file")], ...(scored ? [["sure", say("sure")], ["unsure", say("unsure")]] : [])]);
    at("more").textContent = say("more");
  }

  function matches(row) {
    const state = at("state").value, right = at("right").value.slice(1), given = at("given").value.slice(1);
    if (state === "wrong" && row.ok) return false;
    if (state === "right" && !row.ok) return false;
    if (data.errors.includes(state) && !row.errors.some((error) => error[0] === state)) return false;
    if (at("right").value) {
      if (!ner && row.right !== right) return false;
      if (ner && !row.hits.concat(...row.errors.map((e) => e.slice(1))).some((e) => e && e[2] === right)) return false;
    }
    if (at("given").value && (row.given ?? "") !== given) return false;
    const search = at("search").value.toLowerCase();
    return !search || row.text.toLowerCase().includes(search) || row.id.toLowerCase() === search;
  }

  function bars(row) {
    const box = make("div", "bars");
    for (const [label, p] of row.p) {
      const bar = make("i");
      bar.style.width = (100 * p).toFixed(1) + "%";
      const track = make("span"); track.append(bar);
      box.append(make("span", "", label), track, make("span", "", p.toFixed(3)));
    }
    return box;
  }

  function highlighted(row) {
    const box = make("div", "text"), marks = [];
    const add = (entity, kind) => { if (entity && entity[0] !== null) marks.push([entity[0], entity[1], entity[2], kind]); };
    for (const hit of row.hits) add(hit, "found right");
    for (const [, right, given] of row.errors) { add(right, "missing"); add(given, "wrong"); }
    // Marks may overlap: the text is cut at every border, and a piece wears all that cover it.
    const borders = [...new Set([0, ...marks.flatMap((m) => [m[0], m[1]])])];
    const points = Array.from(row.text), cuts = borders.filter((b) => b <= points.length).sort((a, b) => a - b);
    if (cuts[cuts.length - 1] !== points.length) cuts.push(points.length);
    for (let i = 0; i + 1 < cuts.length; i++) {
      const covering = marks.filter((m) => m[0] <= cuts[i] && m[1] >= cuts[i + 1]);
      const piece = points.slice(cuts[i], cuts[i + 1]).join("");
      if (!covering.length) { box.append(piece); continue; }
      const mark = make("mark", [...new Set(covering.map((m) => m[3]))].join(" "), piece);
      const ending = covering.filter((m) => m[1] === cuts[i + 1]);
      if (ending.length) mark.append(make("sub", "", ending.map((m) => m[2]).join(" / ")));
      box.append(mark);
    }
    if (row.cut) box.append("…");
    return box;
  }

  function draw(row) {
    const card = make("div", "row" + (row.ok ? " ok" : ""));
    card.append(make("div", "meta", "#" + row.id + (row.source ? " · " + row.source : "") +
      (row.truncated ? " · " + say("truncated") : "")));
    if (ner) {
      card.append(highlighted(row));
      for (const [kind, right, given] of row.errors) {
        const told = [right && say("rightIs") + ": " + right[3] + " (" + right[2] + ")",
          given && say("answered") + ": " + given[3] + " (" + given[2] + ")"].filter(Boolean).join(", ");
        card.append(make("div", "bad", say(kind) + ": " + told));
      }
      if (!row.hits.length && !row.errors.length) card.append(make("div", "soft", say("none")));
    } else {
      card.append(make("div", "text", row.text + (row.cut ? "…" : "")));
      card.append(make("div", row.ok ? "good" : "bad",
        say("rightIs") + ": " + row.right + " · " + say("answered") + ": " + name(row.given)));
      if (row.p) card.append(bars(row));
    }
    if (row.answer !== undefined && (ner || row.given === null) && !row.p) card.append(make("pre", "soft", row.answer));
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
    const place = at("confusion");
    if (!place || !data.confusion) return;
    const rights = Object.keys(data.confusion);
    const columns = [...new Set([...rights, ...rights.flatMap((r) => Object.keys(data.confusion[r]))])]
      .sort((a, b) => (a === "") - (b === "") || (a < b ? -1 : 1));
    const grid = make("table", "confusion"), head = make("tr");
    head.append(make("th"), ...columns.map((c) => make("th", "", name(c))));
    grid.append(head);
    for (const right of rights) {
      const line = make("tr"), total = Object.values(data.confusion[right]).reduce((a, b) => a + b, 0);
      line.append(make("th", "side", right));
      for (const given of columns) {
        const count = data.confusion[right][given] || 0, box = make("td");
        const button = make("button", "", count || "");
        button.type = "button";
        button.dataset.right = right; button.dataset.given = given;
        button.title = say("rightIs") + ": " + right + ", " + say("answered") + ": " + name(given) + ": " + count;
        box.style.background = "rgba(var(--heat), " + (0.85 * count / total).toFixed(3) + ")";
        if (cell && cell[0] === right && cell[1] === given) box.className = "chosen";
        button.addEventListener("click", () => {
          cell = [right, given];
          at("state").value = "all"; at("right").value = "=" + right; at("given").value = "=" + given; at("search").value = "";
          shown = STEP; confusion(); list();
          at("rows").scrollIntoView({ behavior: "smooth" });
        });
        box.append(button); line.append(box);
      }
      grid.append(line);
    }
    const wide = make("div", "wide"); wide.append(grid);
    place.replaceChildren(make("h2", "", say("confusion")), make("p", "soft", say("hint")), wide);
  }

  const headings = {
    label: "类别", precision: "精确率", recall: "召回率", F1: "F1", support: "样本数", slice: "分组", rows: "行数", kind: "错误类型",
    entities: "实体数", baseline: "基线", value: "数值", Accuracy: "准确率", "Strict span F1": "实体严格 F1",
    majority: "总是回答最常见的类别", "uniform guess": "随机猜测", dictionary: "训练实体词典", rare: "少见", middle: "中等", frequent: "常见",
    "wrong type": "类型错误", "wrong boundary": "边界错误", "wrong type and boundary": "类型和边界都错误", missed: "漏掉", spurious: "多报",
  };
  // Names that the report's own tables use; labels of the data stand in the first column of `#labels` and stay as they are.
  for (const node of document.querySelectorAll("th, td:first-child")) {
    const known = headings[node.textContent];
    if (known && !(node.tagName === "TD" && node.closest("#labels"))) node.dataset.zh = known;
  }

  function speak(wanted) {
    language = wanted;
    document.documentElement.lang = wanted;
    for (const node of document.querySelectorAll("[data-zh]")) {
      node.dataset.en = node.dataset.en || node.textContent;
      node.textContent = wanted === "zh" ? node.dataset.zh : node.dataset.en;
    }
    at("language").textContent = wanted === "zh" ? "English" : "中文";
    fill(); confusion(); list();
  }

  for (const id of ["search", "state", "right", "given", "order"]) {
    at(id).addEventListener("input", () => { shown = STEP; cell = null; confusion(); list(); });
  }
  at("more").addEventListener("click", () => { shown += STEP; list(); });
  at("clear").addEventListener("click", () => {
    for (const id of ["search", "right", "given"]) at(id).value = "";
    at("state").value = "all"; shown = STEP; cell = null; confusion(); list();
  });
  at("language").addEventListener("click", () => speak(language === "zh" ? "en" : "zh"));
  speak((navigator.language || "en").startsWith("zh") ? "zh" : "en");
  at("state").value = data.rows.some((row) => !row.ok) ? "wrong" : "all";
  list();
})();

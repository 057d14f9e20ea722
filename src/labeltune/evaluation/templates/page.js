"use strict";
// Words stand in English, with the Chinese in data-zh; a page's own script may add to `told` what it draws itself.
const language = {
  now: "en",
  told: [],
  speak(wanted) {
    language.now = wanted;
    document.documentElement.lang = wanted;
    for (const node of document.querySelectorAll("[data-zh]")) {
      node.dataset.en ??= node.textContent;
      node.textContent = wanted === "zh" ? node.dataset.zh : node.dataset.en;
    }
    const button = document.getElementById("language");
    if (button) button.textContent = wanted === "zh" ? "English" : "中文";
    for (const tell of language.told) tell();
  },
  start() {
    document.getElementById("language")?.addEventListener("click", () => language.speak(language.now === "zh" ? "en" : "zh"));
    language.speak((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
  },
};

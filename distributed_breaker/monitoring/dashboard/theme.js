// Light, dark, or as the system has it. It runs before anything is painted, so that nothing flashes.
(() => {
  const THEMES = ["auto", "light", "dark"];
  let theme = "auto";
  try {
    theme = localStorage.getItem("circuit-breakers-theme") ?? "auto";
  } catch {
    // Storage may be forbidden; the switch then holds until the page is left.
  }
  const apply = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  if (!THEMES.includes(theme)) theme = "auto";
  apply();
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const say = () => {
      button.lastElementChild.textContent = theme;
      button.title = `Theme: ${theme}`;
      button.setAttribute("aria-label", button.title);
    };
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try {
        localStorage.setItem("circuit-breakers-theme", theme);
      } catch {
        // As above.
      }
      apply();
      say();
    });
    say();
  });
})();

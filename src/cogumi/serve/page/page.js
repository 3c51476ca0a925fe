// What the page keeps in the browser: a random name, and the last conversations. Every change reads the storage first,
// so that several open tabs add to one list.
window.cogumi = (() => {
  const KEEP = 10;
  const stored = () => {
    try {
      const found = JSON.parse(localStorage.getItem("cogumi.conversations"));
      return Array.isArray(found) ? found : [];
    } catch {
      return [];
    }
  };
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
  const user = () => {
    const known = localStorage.getItem("cogumi.user") || `page-${random()}`;
    localStorage.setItem("cogumi.user", known);
    return known;
  };
  // Gradio leaves the buttons that open the reasons without a name for screen readers.
  const unnamed = "#chat button[aria-label='']";
  new MutationObserver(() =>
    document.querySelectorAll(unnamed).forEach((button) => button.setAttribute("aria-label", "Reasons")),
  ).observe(document, { childList: true, subtree: true });
  const press = (id) => document.querySelector(id)?.click();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") press("#question .stop-button");
    if (event.altKey && event.code === "KeyN") {
      event.preventDefault();
      press("#new");
    }
  });
  const update = (values) => ({ __type__: "update", ...values }); // what Gradio applies to a component
  const unchanged = update({});
  const button = (busy) => ({ submit_btn: !busy, stop_btn: busy, interactive: true });
  const roomy = () => window.innerWidth > 768;
  const listed = (current) => update({ choices: stored().map((one) => [one.title, one.id]), value: current });
  const remember = (conversation) => {
    if (!conversation?.turns?.length) return listed(null);
    const list = [conversation, ...stored().filter((one) => one.id !== conversation.id)];
    for (let kept = KEEP; kept > 0; kept--) {
      try {
        localStorage.setItem("cogumi.conversations", JSON.stringify(list.slice(0, kept)));
        break;
      } catch {} // the storage is full: the oldest one goes
    }
    return listed(conversation.id);
  };
  const blank = () => ({ id: random(), user: user(), turns: [] });
  let current = null; // the conversation
  let running = null; // the run of the answer that is shown
  const ended = new Set(); // runs that a person has stopped or left: what still comes of them is not shown
  const begin = (conversation) => {
    ended.add(running);
    if (current) remember(current);
    current = conversation;
    if (roomy()) setTimeout(() => document.querySelector("#question textarea")?.focus()); // phones open a keyboard
  };
  // Events take the conversation from here, in place of their first input. The functions below it return the question
  // box, the chat and the history.
  return {
    given: (_, ...rest) => [current, ...rest],
    show: (view) => {
      if (view.conversation?.id !== current?.id || ended.has(view.run)) return [unchanged, unchanged, unchanged];
      current = view.conversation;
      running = view.run;
      const box = update({ ...button(view.busy), ...(view.box === null ? {} : { value: view.box }) });
      const chat = update({ value: view.messages, feedback_value: view.ratings });
      return [box, chat, view.busy ? unchanged : remember(current)];
    },
    fresh: () => {
      begin(blank());
      return [update(button(false)), update({ value: [], feedback_value: [] }), listed(null)];
    },
    forget: () => {
      current = null;
      localStorage.removeItem("cogumi.conversations");
      return window.cogumi.fresh();
    },
    open: (id) => {
      begin(stored().find((one) => one.id === id) ?? blank()); // another tab may have deleted it
      return [update(button(false)), unchanged, unchanged];
    },
    stop: () => {
      ended.add(running);
      return [update(button(false)), unchanged, remember(current)];
    },
    rated: (found) => {
      if (found?.id !== current.id) return unchanged;
      current.turns[found.turn].right = found.right;
      return remember(current);
    },
    roomy: () => update({ open: roomy() }), // a sidebar would cover a phone's page
    explain: (on) => {
      document.body.classList.toggle("unexplained", !on);
    },
    save: (text, ending, type) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type }));
      link.download = `conversation.${ending}`;
      link.click();
      URL.revokeObjectURL(link.href);
    },
  };
})();

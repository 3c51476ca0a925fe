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
  const listed = (current) => update({ choices: stored().map((one) => [one.title, one.id]), value: current });
  const idle = update({ submit_btn: true, stop_btn: false });
  return {
    // Outputs of fresh: the conversation, the question box, the chat, the history; of find: the first two.
    fresh: () => [
      { id: random(), user: user(), turns: [] },
      idle,
      update({ value: [], feedback_value: [] }),
      listed(null),
    ],
    find: (id) => [stored().find((one) => one.id === id), idle],
    roomy: () => update({ open: window.innerWidth > 768 }), // a sidebar would cover a phone's page
    explain: (on) => {
      document.body.classList.toggle("unexplained", !on);
    },
    rated: (conversation, found) => {
      if (found) conversation.turns[found.turn].right = found.right;
      return conversation;
    },
    remember: (conversation) => {
      if (!conversation?.turns?.length) return listed(null);
      const others = stored().filter((one) => one.id !== conversation.id);
      localStorage.setItem("cogumi.conversations", JSON.stringify([conversation, ...others].slice(0, KEEP)));
      return listed(conversation.id);
    },
    forget: () => localStorage.removeItem("cogumi.conversations"),
    save: (text, ending, type) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type }));
      link.download = `conversation.${ending}`;
      link.click();
      URL.revokeObjectURL(link.href);
    },
  };
})();


// ---- the server's API --------------------------------------------------------------------------
const access = { key: "" }; // kept in memory only

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function inWords(error) {
  if (error.name === "AbortError") return "Stopped.";
  if (error instanceof Refused) return error.message;
  return "The connection to the server was lost. Is it still running?";
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(access.key && { authorization: `Bearer ${access.key}` }) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const message = said.error?.message ?? `The server answered ${answer.status}.`;
  throw new Refused(answer.status, answer.status === 429 ? `The server is busy: ${message}.` : message);
}

const served = async () => (await (await call("v1/models")).json()).data;

// The events of a streamed answer, as the server sends them.
async function* streamed(path, body, signal) {
  const answer = await call(path, {
    method: "POST", headers: { "content-type": "application/json" }, signal,
    body: JSON.stringify({ ...body, stream: true, stream_mode: "canvas", stream_options: { include_usage: true } }),
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The connection ended before the response was finished.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Refused(0, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What an ONNX file says about itself, which onnxruntime's JavaScript does not tell: ModelProto.metadata_props.

const PROPS = 14;
const DIGEST = 64; // characters: every file that l2o exports ends with its SHA-256 in hex

/** The fields of a protobuf message: [number, bytes] of those that have a length, the others are passed over. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; at < bytes.length && factor < 2 ** 49; factor *= 128) {
      const byte = bytes[at++];
      value += (byte % 128) * factor;
      if (byte < 128) return value;
    }
    throw new RangeError("no protobuf message");
  };
  while (at < bytes.length) {
    const key = varint();
    const wire = key % 8;
    if (wire === 0) varint();
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === 2) {
      const size = varint();
      if (size > bytes.length - at) throw new RangeError("cut short");
      yield [Math.floor(key / 8), bytes.subarray(at, (at += size))];
    } else throw new RangeError("no protobuf message");
  }
}

/** Metadata of an ONNX file, by key. */
export function metadata(bytes) {
  const decoder = new TextDecoder();
  const found = new Map();
  for (const [number, entry] of fields(bytes)) {
    if (number !== PROPS) continue;
    const parts = new Map(fields(entry));
    found.set(decoder.decode(parts.get(1)), decoder.decode(parts.get(2)));
  }
  return found;
}

/** Whether a file ends with its digest; true where nobody can tell (`crypto.subtle` needs a secure context). */
export async function intact(bytes) {
  if (!globalThis.crypto?.subtle) return true;
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes.subarray(0, -DIGEST)));
  const hex = Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex === new TextDecoder().decode(bytes.subarray(-DIGEST));
}

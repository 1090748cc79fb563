// A SentencePiece unigram model: the ids that the C++ library makes of a text.
// The model is a protocol buffer; the numbers of its fields are those of
// sentencepiece_model.proto.

const SPACE = "\u2581";
const [NORMAL, UNKNOWN, CONTROL] = [1, 2, 3];
const UNIGRAM = 1;
const UNKNOWN_PENALTY = 10;

const fromUtf8 = (bytes) => new TextDecoder().decode(bytes);

/** The fields of a message, as [number, value]; messages are bytes. */
function* fields(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = view.getUint8(at++);
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag & 7;
    let value;
    if (kind === 0) {
      value = varint();
    } else if (kind === 2) {
      const length = varint();
      value = bytes.subarray(at, (at += length));
      if (value.length < length) throw new RangeError("a field is cut short");
    } else {
      value = view.getFloat32(at, true);
      at += kind === 1 ? 8 : 4;
    }
    yield [tag >> 3, value];
  }
}

export class Tokenizer {
  /** @param {Uint8Array} proto The SentencePiece model. */
  constructor(proto) {
    this.pieces = [];
    let trainer = {}, normalizer = {};
    for (const [number, value] of fields(proto)) {
      if (number === 1) {
        const { 1: piece, 2: score, 3: type = NORMAL } =
          Object.fromEntries(fields(value));
        this.pieces.push({ piece: fromUtf8(piece), score, type });
      } else if (number === 2) trainer = Object.fromEntries(fields(value));
      else if (number === 3) normalizer = Object.fromEntries(fields(value));
    }
    const { 3: model = UNIGRAM, 24: isSuffix = 0, 35: byteFallback = 0 } = trainer;
    const { 3: prefix = 1, 4: trim = 1, 5: escape = 1 } = normalizer;
    const isKnown = ({ type }) => [NORMAL, UNKNOWN, CONTROL].includes(type);
    if (model !== UNIGRAM || isSuffix || byteFallback || !prefix || !trim ||
        !escape || !this.pieces.length || !this.pieces.every(isKnown)) {
      throw new Error("The tokenizer is not a SentencePiece unigram model " +
        "with the usual spaces, and this page reads no other.");
    }
    this.charsmap = readCharsmap(normalizer[2]);
    this.ids = new Map();
    this.longest = 1;
    let lowest = Infinity;
    this.pieces.forEach(({ piece, score, type }, id) => {
      if (type === UNKNOWN) this.unknown = id;
      if (type !== NORMAL) return;
      this.ids.set(piece, id);
      this.longest = Math.max(this.longest, [...piece].length);
      lowest = Math.min(lowest, score);
    });
    this.unknownScore = Math.fround(lowest - UNKNOWN_PENALTY);
  }

  /** The likeliest ids of a text, by Viterbi's algorithm. */
  encode(text) {
    const characters = [...this.normalize(text)];
    // Of the likeliest way to each position, in float32 as SentencePiece has it.
    const scores = new Float32Array(characters.length + 1);
    const last = Array(characters.length + 1).fill(null); // its [start, id]
    characters.forEach((character, start) => {
      const reach = (end, id, score) => {
        score = Math.fround(score + scores[start]);
        if (last[end] && score <= scores[end]) return;
        scores[end] = score;
        last[end] = [start, id];
      };
      let piece = "";
      const end = Math.min(start + this.longest, characters.length);
      for (let at = start; at < end; at++) {
        piece += characters[at];
        const id = this.ids.get(piece);
        if (id !== undefined) reach(at + 1, id, this.pieces[id].score);
      }
      if (!this.ids.has(character)) {
        reach(start + 1, this.unknown, this.unknownScore);
      }
    });
    const ids = [];
    for (let at = characters.length; at > 0; ) {
      const [start, id] = last[at];
      // What is unknown in a row is one piece.
      if (id !== this.unknown || ids[0] !== id) ids.unshift(id);
      at = start;
    }
    return ids;
  }

  decode(ids) {
    let text = "";
    for (const id of ids) {
      const { piece, type } = this.pieces[id];
      if (type === UNKNOWN) text += " \u2047 ";
      if (type !== NORMAL) continue;
      text += (text ? piece : piece.replace(SPACE, "")).replaceAll(SPACE, " ");
    }
    return text;
  }

  /** A text with its characters unified, and one SPACE before each word. */
  normalize(text) {
    const plain = this.charsmap(text).replace(/^ +/, "").replace(/ +/g, " ");
    if (!plain) return "";
    return (SPACE + plain.replaceAll(" ", SPACE)).replace(/\u2581+$/, "");
  }
}

/** What replaces the longest known characters: a double-array trie (Darts). */
function readCharsmap(blob) {
  if (!blob?.length) return (text) => text;
  const view = new DataView(blob.buffer, blob.byteOffset, blob.byteLength);
  const size = view.getUint32(0, true);
  const unit = (node) => view.getUint32(4 + 4 * node, true);
  const offset = (unit) => (unit >>> 10) << ((unit & 512) >>> 6);
  const strings = blob.subarray(4 + size);
  return (text) => {
    const bytes = new TextEncoder().encode(text), result = [];
    for (let start = 0; start < bytes.length; ) {
      let node = offset(unit(0)), end = start, found = -1;
      for (let at = start; at < bytes.length; at++) {
        node ^= bytes[at];
        const here = unit(node);
        if ((here & 0x800000ff) !== bytes[at]) break;
        node ^= offset(here);
        if (here & 256) [end, found] = [at + 1, unit(node) & 0x7fffffff];
      }
      if (found < 0) { // a character that stays
        do result.push(bytes[start++]);
        while ((bytes[start] & 192) === 128);
      } else {
        result.push(...strings.subarray(found, strings.indexOf(0, found)));
        start = end;
      }
    }
    return fromUtf8(new Uint8Array(result));
  };
}

//! Detection of the file format. Common mistakes are named in the error, with a hint for the
//! missing step.

use anyhow::{Error, Result, anyhow};
use bytesize::ByteSize;
use wasmparser::{BinaryReader, Parser, Payload};

use super::{SIZE_MAX, quoted};
use crate::model::hint::WithHint;

/// The first bytes of each WebAssembly file.
const MAGIC: &[u8] = b"\0asm";

/// The version and layer bytes of a component, which follow the magic bytes.
const COMPONENT: &[u8] = &[0x0d, 0, 1, 0];

/// The version and layer bytes of a core module.
const CORE_MODULE: &[u8] = &[1, 0, 0, 0];

/// The position of the OS/ABI byte in an ELF file, and wasmtime's value for compiled code.
const ELF_SYSTEM: (usize, u8) = (7, 200);

/// The maximum length of an encoded section length, in bytes.
const LENGTH_BYTES_MAX: usize = 5;

const BUILD_HINT: &str = "build a component: for a Rust crate, set `crate` in the manifest \
                          or use the target wasm32-wasip2; \
                          for other languages, use their component tools";

/// Other file formats by their first bytes: description and hint.
const KINDS: [(&[u8], &str, &str); 17] = [
    (
        b"PK\x03\x04",
        "a zip archive",
        "unpack it and name the .wasm file in it",
    ),
    (b"PK\x05\x06", "an empty zip archive", BUILD_HINT),
    (
        b"\x1f\x8b",
        "compressed with gzip",
        "unpack it with gunzip, or with tar -xzf, and name the .wasm file",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "compressed with zstd",
        "unpack it with unzstd and name the .wasm file",
    ),
    (
        b"BZh",
        "compressed with bzip2",
        "unpack it with bunzip2 and name the .wasm file",
    ),
    (
        b"\xfd7zXZ\0",
        "compressed with xz",
        "unpack it with unxz and name the .wasm file",
    ),
    (
        b"7z\xbc\xaf\x27\x1c",
        "a 7-Zip archive",
        "unpack it and name the .wasm file in it",
    ),
    (
        b"!<arch>\n",
        "a static library",
        "link it: a Rust crate needs crate-type = [\"cdylib\"]",
    ),
    (b"BC\xc0\xde", "LLVM bitcode", BUILD_HINT),
    (b"\x7fELF", "a native program or library", BUILD_HINT),
    (
        b"\xcf\xfa\xed\xfe",
        "a native program or library of macOS",
        BUILD_HINT,
    ),
    (
        b"\xca\xfe\xba\xbe",
        "a native program of macOS or a Java class",
        BUILD_HINT,
    ),
    (b"MZ", "a native program of Windows", BUILD_HINT),
    (b"%PDF", "a PDF document", BUILD_HINT),
    (b"\x89PNG", "a picture", BUILD_HINT),
    (b"#!", "a script", BUILD_HINT),
    (
        b"version https://git-lfs",
        "a Git LFS pointer",
        "fetch the file with: git lfs pull",
    ),
];

/// Refuses bytes that are too many, or do not begin like a component.
pub(super) fn check_file_format(wasm: &[u8]) -> Result<()> {
    if wasm.len() > SIZE_MAX {
        return Err(too_large(wasm.len() as u64));
    }
    match wasm.strip_prefix(MAGIC) {
        Some(rest) if rest.starts_with(COMPONENT) && is_cut_off(wasm) => Err(cut_off(wasm.len())),
        Some(rest) if rest.starts_with(COMPONENT) => Ok(()),
        Some(rest) if rest.starts_with(CORE_MODULE) => Err(core_module(wasm)),
        Some(rest) if rest.len() < COMPONENT.len() => Err(cut_off(wasm.len())),
        Some(rest) => Err(unsupported_version(rest)),
        None => Err(not_webassembly(wasm)),
    }
}

/// The error for a component that is too large.
pub(super) fn too_large(bytes: u64) -> Error {
    let max = ByteSize(SIZE_MAX as u64).display().iec();
    anyhow!("the file has {bytes} bytes; a component may have {max} ({SIZE_MAX} bytes)").hint(
        "build it with optimisation and without debug information, \
         or strip it with: wasm-tools strip FILE -o FILE",
    )
}

/// The error for a component whose last bytes are missing.
pub(super) fn cut_off(bytes: usize) -> Error {
    anyhow!("the file is truncated: it ends after {bytes} bytes, in the middle of a component")
        .hint("copy, download or build it again")
}

/// The error for bytes that begin like a component but are malformed.
pub(super) fn damaged(error: &wasmparser::Error) -> Error {
    anyhow!("{} (byte {})", first_line(error.message()), error.offset())
        .context("the component is damaged, or uses a later version of the component model")
        .hint("build it again with tools for WASI 0.2 or 0.3")
}

pub(super) fn first_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}

/// Whether the last section of a component extends past the end of the file.
fn is_cut_off(wasm: &[u8]) -> bool {
    let mut rest = wasm
        .get(MAGIC.len() + COMPONENT.len()..)
        .unwrap_or_default();
    // A section consists of a kind byte, a length, and that many bytes.
    while let Some((_, after)) = rest.split_first() {
        let mut reader = BinaryReader::new(after, 0);
        let Ok(length) = reader.read_var_u32() else {
            return after.len() < LENGTH_BYTES_MAX;
        };
        match after
            .get(reader.current_position()..)
            .and_then(|body| body.get(length as usize..))
        {
            Some(next) => rest = next,
            None => return true,
        }
    }
    false
}

fn unsupported_version(rest: &[u8]) -> Error {
    let version: Vec<String> = rest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    anyhow!(
        "the file has an unsupported WebAssembly version ({})",
        version.join(" ")
    )
    .hint("build it again with current tools for WASI 0.2")
}

fn not_webassembly(bytes: &[u8]) -> Error {
    if bytes.is_empty() {
        return anyhow!("the file is empty")
            .hint("build it again; a failed build may have left it");
    }
    if MAGIC.starts_with(bytes) {
        return cut_off(bytes.len());
    }
    let (at, compiled) = ELF_SYSTEM;
    if bytes.starts_with(b"\x7fELF") && bytes.get(at) == Some(&compiled) {
        return anyhow!("the file is a precompiled component, which would run as native code")
            .hint(
                "use the .wasm file that it was compiled from; hosts compile components themselves",
            );
    }
    if let Some((_, kind, hint)) = KINDS.iter().find(|(start, ..)| bytes.starts_with(start)) {
        return wrong_kind(kind, hint);
    }
    // A tar archive has its magic bytes at an offset.
    if bytes
        .get(257..)
        .is_some_and(|rest| rest.starts_with(b"ustar"))
    {
        return wrong_kind(
            "a tar archive",
            "unpack it with tar -xf and name the .wasm file in it",
        );
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => text_file(text),
        _ => wrong_kind("of an unknown kind", BUILD_HINT),
    }
}

fn wrong_kind(kind: &str, hint: &str) -> Error {
    anyhow!("the file is {kind}, not a WebAssembly component").hint(hint)
}

fn text_file(text: &str) -> Error {
    let start = without_comments(text);
    let begins = |word: &str| start.starts_with(word);
    if begins("(component") {
        return wrong_kind(
            "the text form of a component",
            "convert it with: wasm-tools parse FILE.wat -o FILE.wasm",
        );
    }
    if begins("(module") || begins("(func") {
        return wrong_kind(
            "the text form of a core module",
            "build a component: convert it with `wasm-tools parse` and `wasm-tools component new`",
        );
    }
    if begins("package ") || begins("interface ") || begins("world ") {
        return wrong_kind(
            "a WIT file, which contains interfaces but no code",
            BUILD_HINT,
        );
    }
    let html = start
        .get(..9)
        .is_some_and(|start| start.eq_ignore_ascii_case("<!doctype"))
        || begins("<html");
    if html {
        return wrong_kind(
            "a web page",
            "check whether the download requires a login, then download the file again",
        );
    }
    wrong_kind("text", BUILD_HINT)
}

/// The text from the first word after leading comments in WAT or WIT syntax.
fn without_comments(text: &str) -> &str {
    let mut rest = text.trim_start_matches('\u{feff}').trim_start();
    loop {
        let skipped = if rest.starts_with(";;") || rest.starts_with("//") {
            rest.split_once('\n').map(|(_, rest)| rest)
        } else if rest.starts_with("(;") {
            rest.split_once(";)").map(|(_, rest)| rest)
        } else {
            None
        };
        match skipped {
            Some(skipped) => rest = skipped.trim_start(),
            None => return rest,
        }
    }
}

/// Whether the bytes are a core module that can be made a component: bindings left a component
/// description in it, or it exports a handler of messages.
pub fn is_module_with_handler(wasm: &[u8]) -> bool {
    let is_module = wasm
        .strip_prefix(MAGIC)
        .is_some_and(|rest| rest.starts_with(CORE_MODULE));
    is_module && (describes_component(wasm) || module_world(wasm).is_some())
}

/// Whether bindings left a component description in a core module.
pub fn describes_component(module: &[u8]) -> bool {
    CoreModule::read(module).describes_component
}

/// The world of a core module that exports a handler of messages.
pub fn module_world(wasm: &[u8]) -> Option<&'static str> {
    let exports = CoreModule::read(wasm).exports;
    let has = |name: &str| exports.iter().any(|export| export == name);
    if has("oncely:worker/handler@0.1.0#handle") {
        Some("worker")
    } else if has("oncely:worker/batch-handler@0.1.0#handle-batch") {
        Some("batch-worker")
    } else {
        None
    }
}

/// The error for a core module, with a hint for the tool that probably built it.
fn core_module(wasm: &[u8]) -> Error {
    let module = CoreModule::read(wasm);
    let imports = |start: &str| module.imports.iter().any(|name| name.starts_with(start));
    let (detail, hint) = if module.describes_component {
        (
            "built for a component but not wrapped yet",
            "wrap it with: wasm-tools component new FILE.wasm -o COMPONENT.wasm, \
             or build for the target wasm32-wasip2",
        )
    } else if imports("wasi_snapshot_preview1") || imports("wasi_unstable") {
        (
            "built for WASI 0.1",
            "build it for WASI 0.2: \
             with Rust for the target wasm32-wasip2 instead of wasm32-wasip1, \
             with TinyGo with -target=wasip2",
        )
    } else if imports("__wbindgen") || imports("./") || imports("wbg") {
        ("built by wasm-bindgen for JavaScript", BUILD_HINT)
    } else if imports("gojs") || imports("go") {
        (
            "built by Go for JavaScript",
            "build it with TinyGo: tinygo build -target=wasip2",
        )
    } else {
        ("code without component interfaces", BUILD_HINT)
    };
    let imported = match module.imports.first() {
        Some(first) => format!("; it imports from {}", quoted(first)),
        None => String::new(),
    };
    anyhow!("the file is a core module, not a component ({detail}{imported})").hint(hint)
}

/// The characteristics of a core module.
#[derive(Default)]
struct CoreModule {
    /// The modules it imports from.
    imports: Vec<String>,
    /// The names it exports.
    exports: Vec<String>,
    /// Whether bindings left a component description in it.
    describes_component: bool,
}

impl CoreModule {
    /// Reads the module up to its first malformed section.
    fn read(wasm: &[u8]) -> CoreModule {
        let mut module = CoreModule::default();
        for payload in Parser::new(0).parse_all(wasm) {
            match payload {
                Ok(Payload::ImportSection(section)) => {
                    let names = section.into_imports().map_while(Result::ok);
                    module
                        .imports
                        .extend(names.map(|import| import.module.to_owned()).take(100));
                }
                Ok(Payload::ExportSection(section)) => {
                    let exports = section.into_iter().map_while(Result::ok);
                    module
                        .exports
                        .extend(exports.map(|export| export.name.to_owned()).take(1_000));
                }
                Ok(Payload::CustomSection(section))
                    if section.name().starts_with("component-type") =>
                {
                    module.describes_component = true;
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        module
    }
}

//! Which kind of file these bytes are. A component is one; the others that people give in its place are called by their
//! names, with the step that is missing.

use anyhow::{Error, Result, anyhow};
use bytesize::ByteSize;
use wasmparser::{BinaryReader, Parser, Payload};

use super::{SIZE_MAX, quoted};
use crate::model::hint::WithHint;

/// What each WebAssembly file begins with.
const MAGIC: &[u8] = b"\0asm";

/// The version and the layer of a component, as they follow.
const COMPONENT: &[u8] = &[0x0d, 0, 1, 0];

/// Those of a core module.
const CORE_MODULE: &[u8] = &[1, 0, 0, 0];

/// Where an ELF file names its system, and the number that wasmtime has there for compiled code.
const ELF_SYSTEM: (usize, u8) = (7, 200);

/// How many bytes a length takes at most.
const LENGTH_BYTES_MAX: usize = 5;

const BUILD_HINT: &str = "build a component: a Rust crate with `crate` in the manifest, or for the target wasm32-wasip2; other \
                         languages with their tool for components";

/// Other kinds of files by their first bytes: what they are called, and what to do.
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
        "the placeholder of a file that Git LFS keeps elsewhere",
        "fetch the file itself with: git lfs pull",
    ),
];

/// Refuses bytes that do not begin like a component, or are too many.
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

/// A component of more bytes than a host takes.
pub(super) fn too_large(bytes: u64) -> Error {
    let most = ByteSize(SIZE_MAX as u64).display().iec();
    anyhow!("the file has {bytes} bytes; a component may have {most}, which is {SIZE_MAX} bytes").hint(
        "build it with optimisation and without debug information, or strip that with: wasm-tools strip FILE -o FILE",
    )
}

/// A component whose last bytes are missing.
pub(super) fn cut_off(bytes: usize) -> Error {
    anyhow!("the file is cut off: it ends after {bytes} bytes, in the middle of a component")
        .hint("copy or download it again, or build it again if a build was interrupted")
}

/// Bytes that begin as a component does, and do not go on as one.
pub(super) fn damaged(error: &wasmparser::Error, wasm: &[u8]) -> Error {
    let names_wasi_3 = wasm.windows(WASI_3.len()).any(|window| window == WASI_3);
    if names_wasi_3 {
        return wasi_3("it has parts of WASI 0.3 in it");
    }
    anyhow!("{} (byte {})", first_line(error.message()), error.offset())
        .context("the component is damaged, or made for a later version of the component model than this host knows")
        .hint("build it again, with a release of its tool that makes components for WASI 0.2")
}

const WASI_3: &[u8] = b"@0.3.";

/// A component for WASI 0.3; `why` is a sentence without its full stop.
pub(super) fn wasi_3(why: &str) -> Error {
    anyhow!("the component is made for WASI 0.3, and this host runs components for WASI 0.2: {why}").hint(
        "build it for WASI 0.2: with Rust for the target wasm32-wasip2, with other tools by their option for WASI 0.2",
    )
}

pub(super) fn first_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}

/// Whether the last section of a component is longer than what is left of the file.
fn is_cut_off(wasm: &[u8]) -> bool {
    let mut rest = wasm
        .get(MAGIC.len() + COMPONENT.len()..)
        .unwrap_or_default();
    // A section is a byte that says of which kind, its length, and that many bytes.
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
        "the file is WebAssembly of a version that this host does not know ({})",
        version.join(" ")
    )
    .hint("build it again with a current release of its tool, for WASI 0.2")
}

fn not_webassembly(bytes: &[u8]) -> Error {
    if bytes.is_empty() {
        return anyhow!("the file is empty")
            .hint("build it again: a build that failed may have left it");
    }
    if MAGIC.starts_with(bytes) {
        return cut_off(bytes.len());
    }
    let (at, compiled) = ELF_SYSTEM;
    if bytes.starts_with(b"\x7fELF") && bytes.get(at) == Some(&compiled) {
        return anyhow!("the file is a precompiled component, which would run as native code")
            .hint("name the .wasm file that it was compiled from; hosts compile components themselves");
    }
    if let Some((_, kind, hint)) = KINDS.iter().find(|(start, ..)| bytes.starts_with(start)) {
        return wrong_kind(kind, hint);
    }
    // The mark of a tar archive stands far inside.
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
        _ => wrong_kind("of a kind that is not known here", BUILD_HINT),
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
            "turn it into bytes with: wasm-tools parse FILE.wat -o FILE.wasm",
        );
    }
    if begins("(module") || begins("(func") {
        return wrong_kind(
            "the text form of a core module",
            "build a component: parse and wrap it with `wasm-tools parse` and `wasm-tools component new`",
        );
    }
    if begins("package ") || begins("interface ") || begins("world ") {
        return wrong_kind(
            "a WIT file, which describes interfaces and holds no code",
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
            "look whether the download asked for a login, and download the file again",
        );
    }
    wrong_kind("text", BUILD_HINT)
}

/// A text from its first word that is no comment of WebAssembly's text form or of WIT.
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

/// A core module, by the tool that probably made it.
fn core_module(wasm: &[u8]) -> Error {
    let module = CoreModule::read(wasm);
    let imports = |start: &str| module.imports.iter().any(|name| name.starts_with(start));
    let (detail, hint) = if module.describes_component {
        (
            "built for a component and not wrapped yet",
            "wrap it with: wasm-tools component new FILE.wasm -o COMPONENT.wasm, or build for the target wasm32-wasip2",
        )
    } else if imports("wasi_snapshot_preview1") || imports("wasi_unstable") {
        (
            "made for WASI 0.1",
            "build it for WASI 0.2: with Rust for the target wasm32-wasip2 in the place of wasm32-wasip1, with TinyGo with \
             -target=wasip2",
        )
    } else if imports("__wbindgen") || imports("./") || imports("wbg") {
        ("made by wasm-bindgen for JavaScript", BUILD_HINT)
    } else if imports("gojs") || imports("go") {
        (
            "made by Go for JavaScript",
            "build it with TinyGo: tinygo build -target=wasip2",
        )
    } else {
        (
            "the inside of a component without its interfaces",
            BUILD_HINT,
        )
    };
    let imported = match module.imports.first() {
        Some(first) => format!("; it imports from {}", quoted(first)),
        None => String::new(),
    };
    anyhow!("the file is a core module, not a component ({detail}{imported})").hint(hint)
}

/// What tells core modules apart.
#[derive(Default)]
struct CoreModule {
    /// The modules it imports from.
    imports: Vec<String>,
    /// Whether bindings left the description of a component in it.
    describes_component: bool,
}

impl CoreModule {
    /// Reads as far as the bytes can be read.
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

//! Tests of each refused file format and each limit.

use std::fmt::Write as _;

use super::*;
use crate::model::hint::hints;

/// A component with instances imported and exported under these names.
fn component(imports: &[&str], exports: &[&str]) -> Vec<u8> {
    let mut text = String::from("(component ");
    for name in imports {
        let _ = write!(text, "(import \"{name}\" (instance)) ");
    }
    text.push_str("(instance $empty) ");
    for name in exports {
        let _ = write!(text, "(export \"{name}\" (instance $empty)) ");
    }
    text.push(')');
    wat::parse_str(&text).unwrap()
}

const HANDLER: &str = "oncely:worker/handler@0.1.0";

/// The refusal of some bytes: the error with its causes, and its hints.
fn refusal(wasm: &[u8]) -> (String, String) {
    let error = inspect(wasm).unwrap_err();
    (format!("{error:#}"), hints(&error).join("\n"))
}

#[test]
fn other_file_kinds_are_identified_in_the_error() {
    let mut tar = vec![0_u8; 512];
    tar[257..262].copy_from_slice(b"ustar");
    let mut compiled = b"\x7fELF\x02\x01\x01\xc8".to_vec();
    compiled.resize(64, 0);
    let cases: [(&[u8], &str, &str); 22] = [
        (b"", "the file is empty", "build it again"),
        (
            b"\0as",
            "truncated: it ends after 3 bytes",
            "copy, download or build it again",
        ),
        (
            b"\0asm\x0d\0",
            "truncated: it ends after 6 bytes",
            "copy, download or build it again",
        ),
        (
            b"\0asm\x0c\0\x01\0",
            "an unsupported WebAssembly version (0c 00 01 00)",
            "current tools",
        ),
        (
            b"\0asm\x01\0\0\0",
            "a core module, not a component",
            "build a component",
        ),
        (b"PK\x03\x04....", "a zip archive", "unpack it"),
        (b"\x1f\x8b\x08\0", "compressed with gzip", "gunzip"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unzstd"),
        (&tar, "a tar archive", "tar -xf"),
        (
            b"\x7fELF\x02\x01\x01\0",
            "a native program or library",
            "wasm32-wasip2",
        ),
        (
            &compiled,
            "a precompiled component, which would run as native code",
            "compile components themselves",
        ),
        (b"!<arch>\n", "a static library", "cdylib"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS",
            "git lfs pull",
        ),
        (
            b"(component)",
            "the text form of a component",
            "wasm-tools parse",
        ),
        (
            b";; mine\n(; long ;) (module (func))",
            "the text form of a core module",
            "wasm-tools component new",
        ),
        (
            b"package a:b;\nworld w {}",
            "a WIT file",
            "build a component",
        ),
        (b"<!DOCTYPE html><html>", "a web page", "download"),
        (
            b"{\"json\": true}",
            "text, not a WebAssembly component",
            "build a component",
        ),
        (b"#!/bin/sh\n", "a script", "build a component"),
        (b"\xff\xfe\0\x01", "of an unknown kind", "build a component"),
        (
            b"MZ\x90",
            "a native program of Windows",
            "build a component",
        ),
        ("päckchen".as_bytes(), "text, not", "build a component"),
    ];
    for (bytes, sentence, hint) in cases {
        let (error, hinted) = refusal(bytes);
        assert!(error.contains(sentence), "{error:?} is not {sentence:?}");
        assert!(hinted.contains(hint), "{hinted:?} is not {hint:?}");
    }
}

#[test]
fn a_core_module_is_identified_by_its_toolchain() {
    let module = |text: &str| wat::parse_str(text).unwrap();
    let cases = [
        (
            r#"(module (import "wasi_snapshot_preview1" "fd_write" (func)) (func (export "_start")))"#,
            "built for WASI 0.1; it imports from `wasi_snapshot_preview1`",
            "wasm32-wasip2 instead of wasm32-wasip1",
        ),
        (
            r#"(module (@custom "component-type:x" "") (func))"#,
            "not wrapped yet",
            "wasm-tools component new",
        ),
        (
            r#"(module (import "__wbindgen_placeholder__" "f" (func)))"#,
            "built by wasm-bindgen",
            "build a component",
        ),
        (
            r#"(module (import "gojs" "f" (func)))"#,
            "built by Go",
            "-target=wasip2",
        ),
        (
            r#"(module (func (export "add")))"#,
            "without component interfaces",
            "build a component",
        ),
    ];
    for (text, sentence, hint) in cases {
        let (error, hinted) = refusal(&module(text));
        assert!(
            error.contains("a core module, not a component") && error.contains(sentence),
            "{error}"
        );
        assert!(hinted.contains(hint), "{hinted}");
    }
}

#[test]
fn the_worker_kind_is_detected_by_its_handler() {
    let handler = |export: &str| {
        inspect(&component(&[], &[export]))
            .unwrap()
            .handler()
            .unwrap()
    };
    assert_eq!(handler(HANDLER), Handler::Message);
    assert_eq!(handler("oncely:worker/batch-handler@0.1.0"), Handler::Batch);
    assert_eq!(handler("wasi:http/incoming-handler@0.2.0"), Handler::Http);
    assert_eq!(handler("wasi:http/incoming-handler@0.2.12"), Handler::Http);
}

#[test]
fn a_component_without_one_handler_of_this_version_is_refused() {
    let cases: [(&[&str], &str, &str); 5] = [
        (
            &[],
            "must export `oncely:worker/handler@0.1.0`",
            "without code",
        ),
        (
            &["wasi:cli/run@0.2.3"],
            "it exports `wasi:cli/run@0.2.3`",
            "a program with a `main`",
        ),
        (
            &["oncely:worker/handler@0.2.0"],
            "exports `oncely:worker/handler@0.2.0`, but hosts run",
            "wit/worker.wit",
        ),
        (&["a:b/c"], "it exports `a:b/c`", "docs/handlers.md"),
        (
            &[HANDLER, "wasi:http/incoming-handler@0.2.0"],
            "2 handlers",
            "",
        ),
    ];
    for (exports, sentence, hint) in cases {
        let (error, hinted) = refusal(&component(&[], exports));
        assert!(error.contains(sentence), "{error}");
        assert!(hinted.contains(hint), "{hinted}");
    }
}

/// The rows of `docs/components.md`: a component with these exports and imports runs or is refused.
#[test]
fn the_table_of_components_made_elsewhere_is_true() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/components.md");
    let document = std::fs::read_to_string(path).unwrap();
    let mut rows = 0;
    for line in document.lines().filter(|line| line.contains("| export `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [_, needs, result] = cells.as_slice() else {
            panic!("{line}");
        };
        let named = |kind: &str| -> Vec<&str> {
            let parts = needs.split(", ").filter_map(|part| part.strip_prefix(kind));
            parts.map(|name| name.trim().trim_matches('`')).collect()
        };
        let (exports, imports) = (named("export"), named("import"));
        let inspected = inspect(&component(&imports, &exports));
        match result.strip_prefix("refused: ") {
            None => assert!(
                *result == "runs" && inspected.is_ok(),
                "{line}: {inspected:?}"
            ),
            Some(_) => {
                let error = format!("{:#}", inspected.unwrap_err());
                let cause = imports.last().or(exports.last()).unwrap();
                assert!(error.contains(cause), "{line}: {error}");
            }
        }
        rows += 1;
    }
    assert!(rows >= 20, "{rows}");
}

#[test]
fn only_imports_that_hosts_provide_are_accepted() {
    let importing = |name: &str| inspect(&component(&[name], &[HANDLER]));
    for provided in [
        "oncely:worker/sql@0.1.0",
        "oncely:worker/types@0.1.7",
        "wasi:logging/logging@0.1.0-draft",
        "wasi:config/store@0.2.0-rc.1",
        "wasi:io/poll@0.2.0",
        "wasi:cli/stdin@0.2.99",
        "wasi:sockets/tcp@0.2.3",
        "wasi:filesystem/preopens@0.2.6",
        "wasi:http/outgoing-handler@0.2.0",
        "wasi:keyvalue/batch@0.2.0-draft2",
        "wasi:config/runtime@0.2.0-draft",
        "wasi:config/store@0.2.0-draft-2024-09-27",
        "wasmcloud:messaging/consumer@0.2.0",
        "wasi:http/client@0.3.0",
        "wasi:clocks/monotonic-clock@0.3.2",
    ] {
        assert!(importing(provided).is_ok(), "{provided}");
    }
    for refused in [
        "wasi:keyvalue/store@0.2.0",
        "wasi:keyvalue/watcher@0.2.0-draft",
        "wasi:keyvalue/store@0.2.0-draft3",
        "wasmcloud:messaging/request-reply@0.2.0",
        "spin:key-value/key-value@3.0.0",
        "wasi:cli/anything@0.2.0",
        "wasi:io/poll@0.2.0-rc.2",
        "wasi:io/poll@0.20.0",
        "wasi:io/poll@0.1.0",
        "wasi:http/incoming-handler@0.2.0",
        "wasi:config/store@0.2.0-draft",
        "oncely:worker/sql@0.2.0",
        "oncely:worker/handler@0.1.0",
        "wasi:io/poll",
        "acme:tools/lib@1.0.0",
        "just-a-name",
    ] {
        let error = format!("{:#}", importing(refused).unwrap_err());
        assert!(
            error.contains(refused) && error.contains("which hosts do not provide"),
            "{error}"
        );
    }
    let (_, hint) = refusal(&component(&["wasi:config/store@0.2.0-draft"], &[HANDLER]));
    assert!(
        hint.contains("hosts provide wasi:config 0.2.0-rc.1"),
        "{hint}"
    );
}

#[test]
fn a_component_for_wasi_3_runs_and_a_release_candidate_is_reported_as_such() {
    for (import, export, handler) in [
        (
            "wasi:cli/stdout@0.3.0",
            "wasi:http/handler@0.3.0",
            Handler::AsyncHttp,
        ),
        (
            "wasi:clocks/system-clock@0.3.1",
            "oncely:worker/async-handler@0.1.0",
            Handler::AsyncMessage,
        ),
    ] {
        let surface = inspect(&component(&[import], &[export])).unwrap();
        assert_eq!(surface.handler().unwrap(), handler);
    }

    let imports = component(&["wasi:clocks/types@0.3.0-rc-2026-02-09"], &[HANDLER]);
    let exports = component(&[], &["wasi:http/handler@0.3.0-rc-2026-03-15"]);
    for wasm in [imports, exports] {
        let (error, hint) = refusal(&wasm);
        assert!(
            error.contains("built for a release candidate of WASI 0.3"),
            "{error}"
        );
        assert!(error.contains("@0.3.0-rc-2026-0"), "{error}");
        assert!(hint.contains("later version of its SDK"), "{hint}");
    }
}

#[test]
fn async_functions_are_found_wherever_they_are() {
    for (text, expected) in [
        ("(component)", false),
        ("(component (type (future)))", true),
        ("(component (type (stream u8)))", true),
        ("(component (type (func async)))", true),
        ("(component (type (func)))", false),
        (
            "(component (type (instance (export \"f\" (func async)))))",
            true,
        ),
        (
            "(component (component (core func (canon task.return))))",
            true,
        ),
        ("(component (component (type (list u8))))", false),
    ] {
        let wasm = wat::parse_str(text).unwrap();
        assert_eq!(is_async(&wasm).unwrap(), expected, "{text}");
        check_code(&wasm).unwrap();
    }
}

/// A component that contains code.
fn with_code() -> Vec<u8> {
    let text = format!(
        r#"(component
            (core module $m
                (memory 1) (data (i32.const 0) "some data that is long enough to be cut")
                (func (export "f") (param i32) (result i32) (local i64)
                    (block (br_if 0 (local.get 0))) (i32.add (local.get 0) (i32.const 1))))
            (core instance (instantiate $m))
            (instance $empty)
            (export "{HANDLER}" (instance $empty)))"#
    );
    wat::parse_str(text).unwrap()
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let wasm = with_code();
    inspect(&wasm).and_then(|_| check_code(&wasm)).unwrap();
    let mut truncated = 0;
    for end in 0..wasm.len() {
        // Cut between two sections, it looks like a component with fewer of them.
        let Err(error) = inspect(&wasm[..end]) else {
            continue;
        };
        assert!(!hints(&error).is_empty(), "{error:#}");
        truncated += usize::from(error.to_string().contains("truncated"));
    }
    assert!(truncated > wasm.len() - 12, "{truncated} of {}", wasm.len());
}

#[test]
fn a_damaged_component_is_an_error_and_never_a_panic() {
    let wasm = with_code();
    let mut refused = 0;
    for at in 8..wasm.len() {
        for value in [0, 0x7f, 0x80, 0xff] {
            let mut damaged = wasm.clone();
            damaged[at] = value;
            let result = inspect(&damaged).and_then(|_| check_code(&damaged));
            refused += usize::from(result.is_err());
        }
    }
    assert!(refused > wasm.len(), "{refused}");
}

#[test]
fn a_function_that_compiles_for_minutes_is_refused_early() {
    let bomb = |locals: usize, blocks: usize| {
        let locals = "(local i64)".repeat(locals);
        let block =
            "(block (br_if 0 (local.get 0)) (local.set 1 (i64.add (local.get 1) (local.get 2))))";
        let text = format!(
            "(component (core module (func (param i32) {locals} {})))",
            block.repeat(blocks)
        );
        check_code(&wat::parse_str(text).unwrap())
    };
    bomb(100, 1_000).unwrap();
    let error = bomb(2_000, 5_000).unwrap_err();
    assert!(
        format!("{error:#}").contains("exceeds a compiler limit"),
        "{error:#}"
    );
    assert_eq!(hints(&error).len(), 1);
}

#[test]
fn functions_types_and_nesting_are_limited() {
    let refused = |inside: &str| {
        let text = format!("(component (core module {inside}))");
        format!(
            "{:#}",
            check_code(&wat::parse_str(text).unwrap()).unwrap_err()
        )
    };
    let error = refused(&"(func)".repeat(100_001));
    assert!(
        error.contains("it has 100001 functions; at most 100000 are allowed"),
        "{error}"
    );
    let error = refused(&"(type (func))".repeat(100_001));
    assert!(error.contains("it declares 100001 types"), "{error}");
    let error = refused(&format!(
        "(func {}{})",
        "block ".repeat(10_001),
        "end ".repeat(10_001)
    ));
    assert!(error.contains("nests 10001 blocks"), "{error}");
    let error = refused(&format!("(func {})", "(local i32)".repeat(20_001)));
    assert!(error.contains("20001 locals"), "{error}");
    let error = refused(&format!(
        "(func {})",
        "(drop (i64.const 0x7fffffffffffffff))".repeat(200_000)
    ));
    assert!(error.contains("a function has"), "{error}");
}

#[test]
fn features_that_hosts_do_not_run_are_named() {
    let refused = |inside: &str| {
        let text = format!("(component (core module {inside}))");
        format!(
            "{:#}",
            check_code(&wat::parse_str(text).unwrap()).unwrap_err()
        )
    };
    assert!(
        refused("(memory 1 2 shared)").contains("do not support: threads"),
        "{}",
        refused("(memory 1 2 shared)")
    );
    assert!(refused("(memory i64 1)").contains("do not support: memory64"));
    assert!(refused("(tag)").contains("do not support: exceptions"));
    assert!(
        refused("(type (struct))").contains("do not support: gc-types"),
        "{}",
        refused("(type (struct))")
    );
    let invalid = refused("(func (result i32) i64.const 0)");
    assert!(invalid.contains("the component is damaged"), "{invalid}");
}

#[test]
fn a_folder_and_a_file_that_is_too_large_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let error = read(folder.path()).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("is a folder, not a WebAssembly component"),
        "{error:#}"
    );
    let large = folder.path().join("large.wasm");
    std::fs::File::create(&large)
        .unwrap()
        .set_len(SIZE_MAX as u64 + 1)
        .unwrap();
    let error = format!("{:#}", read(&large).unwrap_err());
    assert!(
        error.contains("67108865 bytes; a component may have 64.0 MiB"),
        "{error}"
    );
    assert!(read(&folder.path().join("absent.wasm")).is_err());
}

#[test]
fn listed_names_are_few_and_short() {
    assert_eq!(list(&[]), "nothing");
    assert_eq!(list(&["a".into(), "b".into()]), "`a`, `b`");
    let many: Vec<String> = (0..100_000).map(|n| n.to_string()).collect();
    assert!(list(&many).ends_with("`7` and 99992 more"));
    assert!(list(&["ä".repeat(100_000)]).chars().count() < 110);
}

//! The judgement of the hosts of one database: their settings, and the readiness of this one.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;
use super::checks::{HOST_READY, HOST_SETTINGS};
use crate::runtime::HostReport;

/// Compares the settings of this configuration with those of the live hosts. `this` is the name of
/// the one that has them, as it appears in findings.
pub fn judge_settings(
    this: &str,
    settings: &BTreeMap<String, String>,
    reports: &[HostReport],
) -> Vec<Finding> {
    let reported = reports
        .iter()
        .filter(|report| !report.settings.is_empty())
        .map(|report| (report.host.as_str(), &report.settings));
    let all: Vec<(&str, &BTreeMap<String, String>)> =
        std::iter::once((this, settings)).chain(reported).collect();
    let keys: BTreeSet<&String> = all
        .iter()
        .flat_map(|(_, settings)| settings.keys())
        .collect();
    let mut findings = Vec::new();
    for key in keys {
        let mut by_value: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (host, settings) in &all {
            let value = settings.get(key).map_or("unset", String::as_str);
            by_value.entry(value).or_default().insert(host);
        }
        if by_value.len() < 2 {
            continue;
        }
        let values = by_value.iter().map(|(value, hosts)| {
            let hosts: Vec<&str> = hosts.iter().copied().collect();
            format!("{value} ({})", hosts.join(", "))
        });
        let values: Vec<String> = values.collect();
        findings.push(HOST_SETTINGS.advice(
            format!("{key} differs: {}", values.join("; ")),
            format!("set the same {key} on all hosts, and restart them"),
        ));
    }
    if findings.is_empty() {
        findings
            .push(HOST_SETTINGS.ok(format!("{} live hosts, with equal settings", reports.len())));
    }
    findings
}

/// Judges the readiness of a host: the broken workers, or the reason that it is not ready.
pub fn judge_readiness(readiness: &Result<Vec<String>, String>) -> Vec<Finding> {
    match readiness {
        Err(why) => vec![HOST_READY.problem(
            format!("the host is not ready: {why}"),
            "see the host's log, and: oncely status",
        )],
        Ok(broken) if broken.is_empty() => vec![HOST_READY.ok("the host is ready")],
        Ok(broken) => {
            let problem = |why: &String| HOST_READY.problem(why, "oncely workers");
            broken.iter().map(problem).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_setting_that_differs_is_named_with_its_hosts() {
        let settings = |keep: &str| BTreeMap::from([("keep_outputs".to_owned(), keep.to_owned())]);
        let report = |host: &str, keep: &str| HostReport {
            host: host.to_owned(),
            workers: BTreeMap::new(),
            relay: crate::relay::RelayReport::default(),
            settings: settings(keep),
        };
        let equal = judge_settings("this host", &settings("15m"), &[report("a:1", "15m")]);
        assert_eq!(equal.len(), 1);
        assert_eq!(equal[0].level, Level::Ok);
        let reports = [report("a:1", "15m"), report("b:2", "1h")];
        let differ = judge_settings("this host", &settings("15m"), &reports);
        assert_eq!(differ[0].level, Level::Advice);
        assert_eq!(
            differ[0].found,
            "keep_outputs differs: 15m (a:1, this host); 1h (b:2)"
        );
        // A host of an earlier version reports no settings.
        let old = HostReport {
            settings: BTreeMap::new(),
            ..report("c:3", "")
        };
        assert_eq!(
            judge_settings("x", &settings("15m"), &[old])[0].level,
            Level::Ok
        );
    }

    #[test]
    fn a_host_that_is_not_ready_is_a_problem() {
        assert_eq!(judge_readiness(&Ok(Vec::new()))[0].level, Level::Ok);
        let broken = vec!["worker x cannot run".to_owned()];
        assert_eq!(judge_readiness(&Ok(broken))[0].level, Level::Problem);
        assert_eq!(
            judge_readiness(&Err("starting".to_owned()))[0].level,
            Level::Problem
        );
    }
}

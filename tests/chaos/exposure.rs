//! Events that must happen in a campaign before a mutant may count as not caught.

use support::proxy::Cut;

use crate::campaign::Act;
use crate::workload::{Nature, Often};

/// The required exposure of a mutant; a run without it proves nothing.
#[derive(Debug, Clone, Default)]
pub struct Exposure {
    /// Faults to inject, each with its minimum count.
    pub acts: Vec<(Act, u64)>,
    /// A nature published far more often than usual, with its minimum count.
    pub often: Option<(Often, u64)>,
    /// Minimum count of output ids that the stranger takes before their publication.
    pub taken_ids: u64,
    /// Minimum harm recorded by the mutant itself. Faults continue until then.
    pub harm: u64,
}

impl Exposure {
    /// The exposure of a mutant, or none if no campaign is designed for it. The unchanged host
    /// (`none`) gets the faults of all mutants.
    pub fn for_mutant(mutant: &str) -> Option<Exposure> {
        let acts = |acts: &[(Act, u64)]| Exposure {
            acts: acts.to_vec(),
            ..Exposure::default()
        };
        let often = |often, times| Exposure {
            often: Some((often, times)),
            ..Exposure::default()
        };
        Some(match mutant {
            // Messages in flight are lost when the host dies.
            "ack_before_commit" | "inbox_in_own_tx" => acts(&[(Act::Kill, 6)]),
            // The commit did not happen, and succeeds on another connection.
            "resend_commit" => acts(&[(Act::Cut(Cut::CommitNotForwarded), 6)]),
            // The commit happens after the check for it.
            "resolve_by_select" => Exposure {
                harm: 2,
                ..acts(&[(Act::Cut(Cut::CommitDelayed), 4)])
            },
            // The server writes asynchronous commits seconds later, so a stop loses the last ones.
            "synchronous_commit_off" => acts(&[(Act::LoseCommits, 2)]),
            // Unpublished outputs are left to the poller.
            "cursor_by_seq" => acts(&[(Act::Cut(Cut::OutputsNotForwarded), 4), (Act::Kill, 2)]),
            // Outputs are marked as published but did not arrive.
            "mark_before_puback" | "mark_without_filter" => acts(&[
                (Act::Cut(Cut::OutputsNotForwarded), 5),
                (Act::KillBroker, 2),
            ]),
            // Duplicates are frequent, and every effect leaves a trace in its session.
            "skip_claim" | "no_session_reset" => Exposure::default(),
            "skip_release" => often(Often::Nature(Nature::FailsOnce), 20),
            "charge_whole_batch" => often(Often::Nature(Nature::FailsOnceLate), 20),
            "ignore_commit_tag" => often(Often::Nature(Nature::Swallows), 15),
            "reuse_after_trap" => often(Often::Nature(Nature::Trap), 15),
            "skip_dead_letter" => often(Often::Nature(Nature::Malformed), 15),
            "allow_reserved_headers" => often(Often::Nature(Nature::ReservedHeader), 15),
            "trust_duplicate" => Exposure {
                taken_ids: 20,
                ..Exposure::default()
            },
            // The stranger also sends each pointer to another worker.
            "pointer_without_worker" => often(Often::Nature(Nature::Redriven), 20),
            // Outputs leased by a dead host wait until their leases run out.
            "leases_without_instance" => acts(&[(Act::DieWithLeases, 3)]),
            "drop_payload_hash" => often(Often::IdReuse, 15),
            "none" => acts(&[
                (Act::Kill, 3),
                (Act::StopDatabase, 3),
                (Act::KillBroker, 2),
                (Act::Cut(Cut::CommitNotForwarded), 4),
                (Act::Cut(Cut::CommitDelayed), 4),
                (Act::Cut(Cut::OutputsNotForwarded), 4),
            ]),
            _ => return None,
        })
    }
}

"""Tables of the methods of MLflow's stores, and of the content of each of their arguments.

A method or an argument that stands in none of these tables raises; ``tests/redaction`` goes through
all that MLflow has. The tables name methods of ``AbstractStore`` and of the stores derived from it.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Kind(Enum):
    """The kind of content that an argument holds."""

    TEXT = "free text, containers and entities: redacted"
    ID = "made by MLflow: passed on if it looks like it, otherwise it must hold nothing"
    PLACE = "an address: a redacted one would lead elsewhere, so it must hold nothing"
    FILTER = "a query: the texts in it are redacted"
    PERSON = "who did it: replaced"
    PLAIN = "numbers, enumerations and MLflow's own page tokens: passed on"


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


#: Their arguments are redacted, then they run. Reading too: what is looked for was redacted when it
#: was stored, and a server writes queries into its log.
CHECKED: Final = words(
    # tracking
    "add_dataset_to_experiments batch_get_trace_infos batch_get_traces "
    "calculate_trace_filter_correlation create_assessment create_dataset create_experiment "
    "create_issue create_logged_model create_run delete_assessment delete_dataset "
    "delete_dataset_records delete_dataset_tag delete_experiment delete_experiment_tag "
    "delete_logged_model delete_logged_model_tag delete_run delete_tag delete_trace_tag "
    "delete_traces deprecated_end_trace_v2 deprecated_start_trace_v2 end_async_logging "
    "filter_active_experiment_ids finalize_logged_model find_completed_sessions "
    "flush_async_logging get_assessment get_dataset get_dataset_experiment_ids get_experiment "
    "get_experiment_by_name get_issue get_logged_model get_max_step_for_metric get_metric_history "
    "get_metric_history_bulk get_metric_history_bulk_interval "
    "get_metric_history_bulk_interval_from_steps get_run get_trace get_trace_info "
    "link_prompts_to_trace link_traces_to_run log_batch log_batch_async log_inputs "
    "log_logged_model_params log_metric log_metric_async log_outputs log_param log_param_async "
    "log_spans log_spans_async query_trace_metrics record_logged_model "
    "remove_dataset_from_experiments rename_experiment restore_experiment restore_run "
    "search_datasets search_entities_by_destination search_entities_by_source search_experiments "
    "search_issues search_logged_models search_runs search_traces set_dataset_tags "
    "set_experiment_tag set_logged_model_tags set_model_versions_tags set_tag set_tag_async "
    "set_trace_tag shut_down_async_logging start_trace unlink_traces_from_run update_assessment "
    "update_issue update_run_info upsert_dataset_records get_all_experiment_tags get_all_metrics "
    "get_all_params get_all_tags sanitize_metric_value resolve_endpoint_in_scorer "
    # model registry
    "copy_model_version create_model_version create_prompt create_prompt_version "
    "create_registered_model delete_model_version delete_model_version_tag delete_prompt "
    "delete_prompt_alias delete_prompt_tag delete_prompt_version delete_prompt_version_tag "
    "delete_registered_model delete_registered_model_alias delete_registered_model_tag "
    "get_latest_versions get_model_version get_model_version_by_alias "
    "get_model_version_download_uri get_prompt get_prompt_version get_prompt_version_by_alias "
    "get_registered_model link_prompt_version_to_model link_prompt_version_to_run "
    "list_registered_models rename_registered_model search_model_versions search_prompt_versions "
    "search_prompts search_registered_models set_model_version_tag set_prompt_alias "
    "set_prompt_tag set_prompt_version_tag set_registered_model_alias set_registered_model_tag "
    "transition_model_version_stage update_model_version update_registered_model "
    "get_all_registered_model_aliases_from_path get_all_registered_model_tags_from_path "
    # workspaces
    "get_default_workspace get_workspace list_workspaces resolve_artifact_root"
)

#: Gateways with their keys, MCP servers, webhooks, queues for people, code of scorers: what may be
#: stored of them is not classified.
REFUSED: Final = words(
    "add_guardrail_to_endpoint add_items_to_review_queue archive_traces attach_model_to_endpoint "
    "create_budget_policy create_endpoint_binding create_gateway_endpoint "
    "create_gateway_guardrail create_gateway_model_definition create_gateway_secret "
    "create_label_schema create_mcp_access_endpoint create_mcp_server create_mcp_server_version "
    "create_review_queue delete_budget_policy delete_endpoint_binding delete_gateway_endpoint "
    "delete_gateway_endpoint_tag delete_gateway_guardrail delete_gateway_model_definition "
    "delete_gateway_secret delete_label_schema delete_mcp_access_endpoint delete_mcp_server "
    "delete_mcp_server_alias delete_mcp_server_tag delete_mcp_server_version "
    "delete_mcp_server_version_tag delete_review_queue delete_scorer detach_model_from_endpoint "
    "get_active_online_scorers get_budget_policy get_gateway_endpoint get_gateway_guardrail "
    "get_gateway_model_definition get_label_schema get_label_schema_by_name "
    "get_latest_mcp_server_version get_mcp_access_endpoint get_mcp_server get_mcp_server_version "
    "get_mcp_server_version_by_alias get_mcp_server_versions_for_trace get_online_scoring_configs "
    "get_online_trace_details get_or_create_user_queue get_review_queue get_review_queue_by_name "
    "get_scorer get_secret_info link_mcp_server_versions_to_trace list_budget_policies "
    "list_endpoint_bindings list_endpoint_guardrail_configs list_gateway_endpoints "
    "list_gateway_guardrails list_gateway_model_definitions list_label_schemas "
    "list_review_queue_items list_review_queues list_scorer_versions list_scorers "
    "list_scorers_across_experiments list_secret_infos register_scorer "
    "remove_guardrail_from_endpoint remove_items_from_review_queue resolve_trace_archival_config "
    "search_mcp_access_endpoints search_mcp_server_versions search_mcp_servers "
    "set_gateway_endpoint_tag set_mcp_server_alias set_mcp_server_tag set_mcp_server_version_tag "
    "set_review_queue_item_status sum_gateway_trace_cost update_budget_policy "
    "update_endpoint_guardrail_config update_gateway_endpoint update_gateway_model_definition "
    "update_gateway_secret update_label_schema update_mcp_access_endpoint update_mcp_server "
    "update_mcp_server_version update_review_queue upsert_online_scoring_config "
    "create_or_get_trace_location get_trace_location link_trace_location "
    "set_experiment_trace_location unset_experiment_trace_location "
    # model registry
    "create_webhook delete_webhook get_webhook list_webhooks list_webhooks_by_event test_webhook "
    "update_webhook "
    # workspaces
    "create_workspace delete_workspace update_workspace"
)

#: Methods of artifact repositories that need no check, and those through which files go.
ARTIFACTS: Final[dict[str, bool]] = {
    **dict.fromkeys(
        words(
            "delete_artifacts download_archived_trace_data download_artifacts "
            "download_trace_attachment download_trace_attachment_to_file download_trace_data "
            "download_trace_data_to_file flush_async_logging get_ftp_client get_local_path "
            "get_download_presigned_url list_artifacts parse_s3_compliant_uri "
            "get_s3_file_upload_extra_args get_underlying_uri is_runs_uri parse_runs_uri "
            "is_models_uri split_models_uri parse_gcs_uri parse_wasbs_uri resolve_uri "
            "convert_r2_uri_to_s3_endpoint_url convert_b2_uri_to_s3_endpoint_url"
        ),
        False,
    ),
    **dict.fromkeys(words("log_artifact log_artifacts upload_trace_data upload_attachment"), True),
}

_KINDS: Final = {
    Kind.TEXT: words(
        "alias categories description dst_name "
        "expectation filters experiment_name feedback key "
        " metadata metric metric_key metrics mlflow_model model_config model_type models name "
        "new_name order_by param params prompt_versions rationale records request_metadata "
        "response_format root_causes run_name scorer_version spans src_mv tag tags template "
        "trace_info value datasets assessment workspace_name"
    ),
    Kind.ID: words(
        "assessment_id dataset_id dataset_record_ids deployment_job_id destination_ids exp_id "
        "experiment_id experiment_ids issue_id model_id request_id run_id run_ids run_uuid "
        "source_ids source_run_id trace_id trace_ids"
    ),
    Kind.PLACE: words(
        "artifact_location default_artifact_root local_model_path location locations model_path "
        "run_link source tracking_uri"
    ),
    Kind.FILTER: words("base_filter filter_string filter_string1 filter_string2"),
    Kind.PERSON: words("created_by user_id"),
    Kind.PLAIN: words(
        "aggregations allow_deleted allow_partial archive_existing_versions destination_type "
        "dimensions end_step end_time end_time_ms include_trace_count max_last_trace_timestamp_ms "
        "max_results max_timestamp_millis max_traces metric_name metric_value "
        "min_last_trace_timestamp_ms page_token run_status run_view_type severity source_type "
        "stage stages start_step start_time start_time_ms status steps time_interval_seconds "
        "timestamp_ms version view_type"
    ),
}
#: By its name, what an argument of a checked method holds.
ARGUMENTS: Final[dict[str, Kind]] = {
    argument: kind for kind, arguments in _KINDS.items() for argument in arguments
}

#: MLflow's entities, and which of their fields are identifiers. All other texts are redacted.
ENTITIES: Final[dict[str, frozenset[str]]] = {
    "Metric": words("_model_id _run_id _dataset_digest"),
    **dict.fromkeys(
        words(
            "Param RunTag ExperimentTag InputTag LoggedModelTag LoggedModelParameter "
            "RegisteredModelTag ModelVersionTag DatasetInput AssessmentSource AssessmentError "
            "ExpectationValue FeedbackValue IssueReferenceValue"
        ),
        frozenset[str](),
    ),
    "Dataset": words("_digest"),
    "LoggedModelInput": words("_model_id"),
    "LoggedModelOutput": words("_model_id"),
    "TraceInfo": words("trace_id"),
    "TraceLocation": frozenset(),
    "MlflowExperimentLocation": words("experiment_id"),
    **dict.fromkeys(
        words("Assessment Feedback Expectation IssueReference"),
        words("trace_id run_id span_id assessment_id overrides"),
    ),
    "PromptVersion": words("_version"),
    "ModelVersion": words("_version _run_id _model_id"),
}
